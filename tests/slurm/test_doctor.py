"""`distloop doctor` before a big job: one task per GPU under srun, on two nodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.tools.slurm_cluster import Cluster


def test_doctor_sees_all_ranks_of_both_nodes_and_the_directory_they_share(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "doctor.sh"
    script.write_text(f'#!/bin/bash\nexport OMP_NUM_THREADS=1\nsrun {sys.executable} -m distloop.doctor --json "$@"\n')
    options = ["-N2", "--ntasks-per-node=2", "--gpus-per-node=2"]
    job = cluster.submit(script, "--expect-world", "4", "--runs-dir", str(tmp_path / "runs"), options=options)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    log = cluster.log(job)
    table = json.loads(log[log.index("{") : log.rindex("}") + 1])
    assert (table["world_size"], table["nodes"]) == (4, ["n1", "n2"])
    found = {line["check"]: line for line in table["lines"]}
    assert found["launch"]["found"] == "ranks 0-1 on n1, ranks 2-3 on n2"
    assert found["run directory"]["verdict"] == "ok"
    assert "shared by all ranks" in found["run directory"]["found"]
    assert "4 ranks: 4 KiB in" in found["all-reduce"]["found"]
    assert [rank["settings"].get("CUDA_VISIBLE_DEVICES") for rank in table["ranks"]] == ["0,1"] * 4
