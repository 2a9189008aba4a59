"""Habits of models and tasks, and the settings with which they train."""

from __future__ import annotations

import textwrap
from typing import Any

from tests.tools.habits.data import DataHabits
from tests.tools.habits.texts import UNKNOWN_TO_TASKS


class TrainingHabits(DataHabits):
    """Writes Net and Mine, and fills in the settings."""

    def model(self) -> str:
        tokens, image = self.problem == "tokens", self.problem == "image"
        outputs = {"tokens": 10, "value": 1}.get(self.problem, 3)
        self.batch_norm = not tokens and self.dtype == "float64" and self.maybe(0.15)
        width = 48 if image else 1 if self.scalars else 4
        init = ["self.first = " + ("nn.Embedding(10, 8)" if tokens else f"nn.Linear({width}, 8)")]
        forward = ["inputs = inputs.flatten(1)"] if image else []
        if self.scalars:
            forward.append("inputs = inputs[:, None]")
        if self.problem in ("value", "class") and not self.x_dtype.startswith("float"):
            forward.append("inputs = inputs.to(self.first.weight.dtype) / 50")
        forward.append("hidden = torch.tanh(self.first(inputs))")
        for part in (self._layers, self._buffers, self._draws, self._odd_parts):
            for lines, more in zip((init, forward), part(), strict=True):
                lines += more
        init.append(f"self.last = nn.Linear(8, {outputs})")
        forward.append("scores = self.last(hidden)" + ("[:, 0]" if self.problem == "value" else ""))
        self.output = self.one_of("tensor", "tensor", "tuple", "dict", "dataclass")
        self.has(f"outputs: {self.output}")
        returned = {
            "tensor": "scores",
            "tuple": "scores, hidden",
            "dict": '{"scores": scores, "hidden": hidden}',
            "dataclass": "Outputs(scores, hidden)",
        }[self.output]
        self.scores = {
            "tensor": "outputs",
            "tuple": "outputs[0]",
            "dict": 'outputs["scores"]',
            "dataclass": "outputs.scores",
        }[self.output]
        self.method = "forward"
        if self.maybe(0.06) and self.either("the task calls another method of the model than forward"):
            self.method = "encode"
        body = textwrap.indent("\n".join([*forward, f"return {returned}"]), "        ")
        return (
            "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            + textwrap.indent("\n".join(init), "        ")
            + f"\n\n    def {self.method}(self, inputs):\n{body}"
        )

    def _layers(self) -> tuple[list[str], list[str]]:
        init, forward = [], []
        if self.batch_norm:
            self.has("BatchNorm")
            init.append("self.norm = nn.BatchNorm1d(8)")
            forward.append("hidden = self.norm(hidden)")
        if self.maybe(0.25):
            self.has("tied weights")
            init += ["self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)", "self.two.weight = self.one.weight"]
            forward.append("hidden = torch.tanh(self.two(torch.tanh(self.one(hidden))))")
        if self.maybe(0.15):
            self.has("frozen weights")
            init.append("self.first.requires_grad_(False)")
        if self.maybe(0.2):
            self.has("dropout")
            init.append("self.dropout = nn.Dropout(0.3)")
            forward.append("hidden = self.dropout(hidden)")
        return init, forward

    def _buffers(self) -> tuple[list[str], list[str]]:
        init, forward = [], []
        if self.maybe(0.2):
            self.has("a buffer counts training's forward passes")
            init.append('self.register_buffer("steps", torch.tensor(0))')
            counted = self.one_of("self.steps += 1", "self.steps = self.steps + 1")
            forward.append(f"if self.training:\n    {counted}")
        if self.maybe(0.1):
            self.has("a buffer counts all forward passes")
            init.append('self.register_buffer("calls", torch.tensor(0.0))')
            forward.append("self.calls += 1")
        if self.maybe(0.1):
            self.has("a buffer in half precision, one that is not saved")
            init.append('self.register_buffer("half_scale", torch.tensor(0.5, dtype=torch.float16))')
            init.append('self.register_buffer("hidden_scale", torch.full((8,), 1.5), persistent=False)')
            forward.append("hidden = hidden * self.half_scale * self.hidden_scale")
        return init, forward

    def _draws(self) -> tuple[list[str], list[str]]:
        init, forward = [], []
        if self.wrong_habit == "init":
            # What it draws is a parameter, which a checkpoint brings back.
            self.unseeded("the model begins with its own generator", "generator", differs_when_continued=False)
            init.append("self.bias = nn.Parameter(torch.tensor(np.random.default_rng().random(8)))")
            forward.append("hidden = hidden + self.bias")
        if self.maybe(0.2):
            init.append(f"self.scale = 0.5 + {self.drawn('model')}")
            forward.append("hidden = hidden * self.scale")
        if self.maybe(0.25):
            noise = f"hidden = hidden * (0.5 + {self.drawn('forward')})"
            forward.append(noise if self.maybe(0.4) else f"if self.training:\n    {noise}")
        return init, forward

    def _odd_parts(self) -> tuple[list[str], list[str]]:
        if self.wrong_habit == "unused" or (self.case.world_size == 1 and self.maybe(0.05)):
            name = "a parameter that no forward pass uses"
            if self.case.world_size > 1:
                self.expect("refused", name, "unused_part")
            else:
                self.has(name)
            return ["self.unused_part = nn.Linear(3, 3)"], []
        if self.maybe(0.06) and self.either("a complex buffer"):
            line = 'self.register_buffer("phase", torch.polar(torch.ones(8), torch.arange(8.0)))'
            return [line], ["hidden = (hidden * self.phase.to(torch.complex128)).imag.to(hidden.dtype)"]
        return [], []

    # ---- task ----------------------------------------------------------------------------------------------------

    def task(self) -> str:
        self.case.settings["task"] = "mine:Mine"
        own_forward = self.form in UNKNOWN_TO_TASKS or self.method != "forward"
        built_in = not own_forward and self.output == "tensor" and self.problem != "tokens" and self.form != "nested"
        if built_in and not self.wrong_habit and self.maybe(0.3):
            self.case.settings["task"] = "regression" if self.problem == "value" else "classification"
            self.has(f"task: {self.case.settings['task']}")
            return ""
        methods, weight = [], "samples"
        if own_forward or self.maybe(0.2):
            call = "model" if self.method == "forward" else "model.encode"
            methods.append(f"def forward(self, model, batch):\n    return {call}({self.x})")
        loss, weight = self._loss()
        methods.append("def loss(self, outputs, batch):\n" + textwrap.indent(loss, "    "))
        methods += self._metrics()
        parts = self._task_parts()
        head = "class Mine(Task, nn.Module):\n" if "super" in "".join(parts) else "class Mine(Task):\n"
        if weight != "samples" or self.maybe(0.3):
            head += f'    weight = "{weight}"\n\n'
        return head + textwrap.indent("\n\n".join([*parts, *methods]), "    ")

    def _task_parts(self) -> list[str]:
        if self.wrong_habit == "task parameters":
            init = self.one_of("", "    super().__init__()\n")
            if init:  # an nn.Module, whose parameters are trained
                self.has("task with parameters of its own")
            else:
                self.expect("refused", "a task that is no module, with parameters", "parameter|task")
            return [f"def __init__(self):\n{init}    self.factor = nn.Parameter(torch.ones(()))"]
        return []

    def _loss(self) -> tuple[str, str]:
        """The body of loss(), and the unit of its weight."""
        lines = [f"scores, y = {self.scores}, {self.y}"]
        weight, n = "samples", "len(y)"
        if self.problem == "value":
            lines.append("losses = (scores - y) ** 2")
        elif self.problem == "tokens":
            lines.append("scores, y = scores.flatten(0, 1), y.flatten()")
            lines.append('losses = functional.cross_entropy(scores, y, ignore_index=-100, reduction="none")')
            weight, n = self.one_of("tokens", "pixels"), "(y != -100).sum()"
        else:
            lines.append('losses = functional.cross_entropy(scores, y.long(), reduction="none")')
        if self.maybe(0.2):
            lines.append(f"losses = losses * (0.5 + {self.drawn('loss')})")
        if self.wrong_habit == "task parameters":
            lines.append("losses = losses * self.factor")
        if line := self._wrong_loss(n):
            return "\n".join([*lines, line]), weight
        if self.problem == "class" and self.maybe(0.15):
            self.has("class weights, as the weight")
            lines.append("w = torch.tensor([0.3, 1.0, 0.7], dtype=scores.dtype)[y.long()]")
            return "\n".join([*lines, "return (losses * w).sum(), w.sum()"]), "tokens"
        if self.problem == "class" and self.maybe(0.15):
            self.has("each sample's loss knows the others of its micro-batch")
            lines.append("alike = functional.cross_entropy(scores @ scores.T, torch.arange(len(y)), reduction='sum')")
            return "\n".join([*lines, "return losses.sum() + 0.1 * alike, len(y)"]), "samples"
        if self.output != "tensor" and self.problem != "tokens" and self.maybe(0.2):
            self.has("a penalty on hidden values")
            hidden = self.scores.replace("scores", "hidden").replace("[0]", "[1]")
            return "\n".join([*lines, f"return losses.sum() + 0.01 * {hidden}.square().sum(), len(y)"]), "samples"
        if self.problem == "tokens" and self.maybe(0.2):
            self.has("tokens, weighed by samples")
            return "\n".join([*lines, f"return losses.sum(), len({self.y})"]), "samples"
        counts = (
            ["{}", "int({})", "float({})"] if self.problem == "tokens" else ["{}", "torch.tensor({})", "np.int64({})"]
        )
        count = self.one_of(*counts).format(n)
        mean = f"losses.mean() * {n}" if self.problem != "tokens" else f"losses[y != -100].mean() * {n}"
        total = self.one_of("losses.sum()", "losses.sum()", mean, "sum(losses)")
        self.has(f"loss: {total}, {count}")
        return "\n".join([*lines, f"return {total}, {count}"]), weight

    def _wrong_loss(self, n: str) -> str:
        """What a loss() returns that must not be returned; "" if this case has another habit that is not right."""
        mean = "losses.mean()" if self.problem != "tokens" else "losses[y != -100].mean()"
        name, line = {
            "mean": ("a mean with its weight", f"return {mean}, {n}"),
            "mean of tokens": ("a mean with its weight", f"return {mean}, {n}"),
            "mean alone": ("a mean alone", f"return {mean}"),
            "mean with weight 1": ("a mean with the weight 1", f"return {mean}, 1"),
            "half": ("half of the samples do not count", "return losses.sum(), len(y[::2])"),
            "class weights": (
                "class weights, as samples",
                "w = 0.3 + 0.5 * (y > 0)\nreturn (losses * w).sum(), w.sum()",
            ),
        }.get(self.wrong_habit, ("", ""))
        if line:
            self.expect("refused", name, "sum|weight")
        return line

    def _metrics(self) -> list[str]:
        if self.maybe(0.25) and not self.wrong_habit.endswith("name"):
            return []
        y = self.y
        if self.problem == "value":
            value, kinds = (
                f"({self.scores} - {y}).abs().sum()",
                ["{}", "{}.item()", "np.float64({}.item())", "{}.numpy()"],
            )
        else:
            value = f"({self.scores}.argmax(-1) == {y}).sum()"
            kinds = [
                "{}",
                "{}.item()",
                "int({})",
                "np.int64({}.item())",
                "{}.numpy()",
                "float({})",
                "{}.to(torch.int32)",
            ]
        kind = self.one_of(*kinds)
        self.has(f"metric: {kind}")
        metrics = [f'"found": {kind.format(value)}']
        if self.maybe(0.2):
            metrics.append(f'"drawn": {self.drawn("metrics")} * float({value})')
        if self.wrong_habit == "metric name":
            name = self.one_of("loss", "samples", "weight")
            self.expect("refused", f"a metric of the name {name}", name)
            metrics.append(f'"{name}": {value}')
        lines = [
            'numbers = {"found": ' + self.one_of('float(sums["found"])', 'sums["found"].numpy()', 'sums["found"]') + "}"
        ]
        lines.append('numbers["per_sample"] = ' + self.one_of(*SHARES))
        if self.maybe(0.2):
            lines.append(f'numbers["drawn_at_the_end"] = {self.drawn("summary")}')
        if self.wrong_habit == "summary name":
            name = self.one_of("step", "epoch", "kind", "time")
            self.expect("refused", f"a number of a validation of the name {name}", name)
            lines.append(f'numbers["{name}"] = 7')
        lines.append("return {**super().summary(sums), **numbers}")
        return [
            f"def metrics(self, outputs, batch):\n    return {{{', '.join(metrics)}}}",
            "def summary(self, sums):\n" + textwrap.indent("\n".join(lines), "    "),
        ]

    # ---- settings ------------------------------------------------------------------------------------------------

    def settings(self) -> None:
        case = self.case
        optimizer = "sgd" if self.dtype == "float32" else self.one_of("sgd", "adam", "adamw")
        optim: dict[str, Any] = {"name": optimizer, "lr": 0.05 if optimizer == "sgd" else 0.01}
        optim["weight_decay"] = self.one_of(0.0, 0.05)
        if self.maybe(0.3):
            optim["clip_norm"] = 0.3
        schedule: dict[str, Any] = {"name": self.one_of("constant", "cosine", "linear")}
        if self.maybe(0.3):
            schedule["warmup_steps"] = 2
        # A short last step may give a rank a single sample, on which BatchNorm cannot train.
        remainder = "drop" if self.batch_norm else self.one_of("drop", "train")
        self.has(f"{optimizer}, {schedule['name']}, {remainder} the remainder, {self.dtype}")
        case.settings |= {
            "model": "mine:Net",
            "seed": self.random.randrange(5),
            "device": "cpu",
            "dtype": self.dtype,
            "optim": optim,
            "schedule": schedule,
            "batch": {
                "global_size": self.global_size,
                "micro_size": self.global_size // (case.world_size * case.accumulation),
                "remainder": remainder,
            },
            "train": {"epochs": self.one_of(2, 3)},
            "validate": {"batch_size": self.one_of(3, 4), "every_epochs": self.one_of(1, 2)},
            "checkpoint": {"every_steps": 1 if case.stop == "SIGKILL" else None},
            "log": {"every_steps": 1},
            "ddp": {"timeout_seconds": 60},
        }


SHARES = (
    'float(sums["found"]) / int(sums["samples"])',
    'sums["found"] / sums["weight"]',
    'np.float64(sums["found"]) / float(sums["weight"])',
)
