"""The check of environment variables and of Accelerate's default file."""

from collections.abc import Callable

from distloop.commands.doctor.results import Facts, Result, fail, ok, spread_text, warn, where


def _is_on(value: str) -> bool:
    return value.lower() not in ("", "0", "false", "no")


HIDING = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES; the last is Slurm's, for jobs without GPUs

# variable -> (function of its value: whether it is bad, advice)
BAD_SETTINGS: dict[str, tuple[Callable[[str], bool], str]] = {
    "CUDA_LAUNCH_BLOCKING": (_is_on, "The CPU waits for each kernel: unset it unless you look for an error."),
    "NCCL_DEBUG": (lambda value: value.upper() == "TRACE", "It writes without end: use WARN or INFO."),
    "NCCL_P2P_DISABLE": (_is_on, "GPUs talk through the host's memory: unset it."),
    "NCCL_SHM_DISABLE": (_is_on, "GPUs of a node may talk through the network: unset it."),
    "NCCL_IB_DISABLE": (_is_on, "Nodes talk through plain sockets: unset it where there is InfiniBand or RoCE."),
    "TORCH_DISTRIBUTED_DEBUG": (lambda value: value.upper() == "DETAIL", "It checks each collective: unset it."),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (lambda value: value == "0", "A failed collective hangs: unset it."),
    "TORCH_NCCL_BLOCKING_WAIT": (_is_on, "The CPU waits for each collective: unset it."),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (_is_on, "Each tensor asks the driver for memory: unset it."),
}


def variables(facts: Facts) -> list[Result]:
    """Variables and files that change how PyTorch, NCCL or Accelerate work."""
    results = []
    for name, (is_bad, advice) in BAD_SETTINGS.items():
        if bad := [fact for fact in facts if name in fact["settings"] and is_bad(fact["settings"][name])]:
            results.append(warn(f"{name}={bad[0]['settings'][name]} for {where(bad)}", advice))
    hidden = [fact for fact in facts if fact["settings"].get("CUDA_VISIBLE_DEVICES") in HIDING]
    if hidden and facts[0]["wants_device"] != "cpu":
        value = hidden[0]["settings"]["CUDA_VISIBLE_DEVICES"] or "set and empty"
        found = f"CUDA_VISIBLE_DEVICES is {value} for {where(hidden)}: all GPUs are hidden"
        results.append(warn(found, "Unset it, or say --device cpu if that is meant."))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if wrong := [fact for fact in facts if name in fact["unknown_interfaces"]]:
            found = f"{name}={wrong[0]['unknown_interfaces'][name]} names no network interface of {where(wrong)}"
            results.append(fail(found, "Unset it, or name one that `ip link` shows on that node."))
    for name in sorted({name for fact in facts for name in fact["settings"] if "NCCL_" in name}):
        if spread := spread_text(facts, [fact["settings"].get(name, "unset") for fact in facts]):
            results.append(warn(f"{name} differs: {spread}", "Export it alike on all nodes, or nowhere."))
    if file := next((fact["accelerate_config"] for fact in facts if fact["accelerate_config"]), None):
        advice = "Give `accelerate launch --config_file launch/accelerate/….yaml`, as the scripts in launch/ do."
        results.append(warn(f"{file} decides what a bare `accelerate launch` is not told", advice))
    return results or [ok("no setting that is known to be bad")]
