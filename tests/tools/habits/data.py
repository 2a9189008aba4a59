"""Habits of data: what a sample and a batch are, what kind of data set gives them, how it is split."""

from __future__ import annotations

import textwrap

from tests.tools.habits.draft import OWN_DRAWS, Draft
from tests.tools.habits.texts import DATA_SETS, MADE, TAKEN

# The kinds of data sets; those that stand there several times are drawn as often.
OF_ROWS = [
    "list",
    "class",
    "class",
    "transform",
    "subset",
    "concat",
    "attributes",
    "tensors",
    "memory",
    *(["file"] * 4),
]
KINDS = {
    "value": OF_ROWS,
    "class": OF_ROWS,
    "tokens": ["list", "class", "subset", "attributes"],
    "image": ["class", "memory", "transform", "subset"],
}


class DataHabits(Draft):
    """Writes make_data() and collate(), and notes in `x` and `y` how a task takes both from a batch."""

    def data(self) -> str:
        self.global_size = self.one_of(8, 12)
        self.rows = self.global_size * self.one_of(2, 3) + self.random.randrange(self.global_size)
        self.validated = self.one_of(5, 8, 9, 11)
        # With tensors a sample draws nothing, and no collate is asked for.
        loaded = self.wrong_habit in ("sample", "collate", "dataclass")
        self.kind = self.one_of(*(("list", "class", "concat") if loaded else KINDS[self.problem]))
        self.in_tensors = self.kind in ("tensors", "memory")
        self.has(f"{self.problem} data: {self.kind}")
        self.case.settings["data"] = {"name": "mine:make_data", "workers": self.case.workers}
        parts = [self._rows(), self._sample(), self._data_set(), self._make_data(), self._collate()]
        return "\n\n\n".join(part.rstrip() for part in parts if part)

    def _rows(self) -> str:
        """The same rows in each process: INPUTS and TARGETS."""
        total, number = self.rows + self.validated, self.case.number
        text = f"SAMPLES, VALIDATED = {self.rows}, {self.validated}\n"
        if self.problem == "tokens":
            text += f"PIECES = [(np.arange(4 + i % 4) * (1 + i % 3) + i) % 10 for i in range({total})]\n"
            return text + "INPUTS, TARGETS = [p[:-1] for p in PIECES], [p[1:] for p in PIECES]"
        text += f"NUMBERS = np.random.RandomState({number})  # the same rows in each process\n"
        if self.problem == "image":
            text += f"INPUTS = NUMBERS.randint(0, 256, ({total}, 3, 4, 4)).astype(np.uint8)\n"
        else:
            text += f"INPUTS = NUMBERS.randn({total}, 4)\n"
        if self.problem == "value":
            return text + "TARGETS = INPUTS @ np.array([1.0, -0.5, 0.25, 2.0])"
        return text + f"TARGETS = np.arange({total}) % 3"

    def _sample(self) -> str:
        """sample(row, target): what the data set gives for a row."""
        lines, x = [], self._input()
        if self.wrong_habit == "sample":
            self.unseeded("a sample draws from its own generator", "generator", self.kind == "list")
            lines.append(f"row = row + 0.2 * {self.one_of(*OWN_DRAWS)}")
        elif not self.in_tensors and self.problem != "tokens" and self.maybe(0.5):
            drawn = self.drawn("sample")
            flipped = f"if {drawn} < 0.5:\n    row = row[:, :, ::-1].copy()"
            lines.append(flipped if self.problem == "image" else f"row = row + 0.2 * {drawn}")
        lines += [f"x = {x}", f"y = {self._target()}"]
        self.form = "tuple" if self.in_tensors else self.one_of(*self._forms())
        self.form = "dataclass" if self.wrong_habit == "dataclass" else self.form
        self.has(f"samples: {self.form}")
        lines.append(f"return {MADE[self.form]}")
        return "def sample(row, target):\n" + textwrap.indent("\n".join(lines), "    ")

    def _forms(self) -> list[str]:
        if self.problem == "image":
            return ["tuple", "dict"]
        forms = ["tuple", "tuple", "list", "dict", "own dict", "named tuple", "dataclass", "nested"]
        return [*forms, "bare"] if self.problem == "value" and not self.scalars else forms

    def _input(self) -> str:
        library = self.one_of("numpy", "torch")
        self.scalars = self.problem in ("value", "class") and self.maybe(0.1)
        floats = ("float64", "float32", "float64", "float32", "float16")
        others = () if self.wrong_habit == "sample" else ("uint8", "int16", "int64", "bool")  # a draw must not get lost
        if self.scalars:
            self.x_dtype = "float64"
            self.has(f"inputs: {library} of no dimension")
            return "row[0]" if library == "numpy" else "torch.tensor(row[0])"
        self.x_dtype = {"image": "uint8", "tokens": self.one_of("int64", "int16", "uint8")}.get(
            self.problem, self.one_of(*floats, *others)
        )
        self.has(f"inputs: {library} {self.x_dtype}")
        value = f"row.astype(np.{self.x_dtype})"
        if self.problem in ("value", "class"):
            whole = {
                "uint8": "(row * 20 + 100).clip(0, 255).astype(np.uint8)",
                "int16": "(row * 50).astype(np.int16)",
                "int64": "(row * 10).astype(np.int64)",
                "bool": "row > 0",
            }
            value = whole.get(self.x_dtype, value)
            if self.maybe(0.15):
                self.has("inputs are not contiguous")
                value = f"np.stack([{value}, {value}], 1)[:, 1]"
        return value if library == "numpy" else f"torch.from_numpy({value})"

    def _target(self) -> str:
        if self.problem == "tokens":
            return self.one_of("target.astype(np.int64)", "torch.from_numpy(target.astype(np.int64))")
        whole = ["int(target)", "np.int64(target)", "np.uint8(target)", "np.int16(target)", "torch.tensor(int(target))"]
        whole += ["torch.tensor(int(target), dtype=torch.int32)", "np.array(int(target))"]
        real = ["float(target)", "np.float32(target)", "np.float64(target)", "torch.tensor(float(target))"]
        real += ["torch.tensor(float(target), dtype=torch.float64)", "np.array(target)"]
        value = self.one_of(*(real if self.problem == "value" else whole))
        self.has(f"targets: {value}")
        return value

    def _data_set(self) -> str:
        if self.kind == "list" or self.in_tensors:
            return ""
        if self.kind == "file":
            how = self.one_of("seek", "seek", "zip", "sqlite", "mmap")
            self.has(f"opened at the first sample: {how}")
            return DATA_SETS[how]
        if self.kind == "attributes":  # names that others use, too
            names = {"batch": "8", "draws": "0", "classes": "3", "targets": "list(order)", "samples": "len(order)"}
            chosen = [name for name in names if self.maybe(0.5)] or ["batch"]
            self.has(f"attributes of the data set: {', '.join(chosen)}")
            more = "".join(f"\n        self.{name} = {names[name]}" for name in chosen)
            return DATA_SETS["class"].replace("self.order = order", "self.order = order" + more)
        return DATA_SETS["transform" if self.kind == "transform" else "class"]

    def _make_data(self) -> str:
        lines = [self._split()]
        if self.kind == "subset":
            lines.append("rows = Rows(range(len(INPUTS)))")
        if self.in_tensors:
            lines.append("pairs = [sample(INPUTS[i], TARGETS[i]) for i in range(len(INPUTS))]")
            lines.append("x = torch.stack([torch.as_tensor(x) for x, _ in pairs])")
            lines.append("y = torch.stack([torch.as_tensor(y) for _, y in pairs])")
        if self.kind == "tensors":
            lines.append("rows = TensorDataset(x, y)")
        made = {
            "list": "[sample(INPUTS[i], TARGETS[i]) for i in HALF]",
            "subset": "Subset(rows, HALF)",
            "concat": "ConcatDataset([Rows(HALF[:3]), Rows(HALF[3:])])",
            "tensors": "Subset(rows, HALF)",
            "memory": "InMemory(x[HALF], y[HALF])",
            "transform": "Rows(HALF, transform=transform)",
        }.get(self.kind, "Rows(HALF)")
        train, validation = (made.replace("HALF", half) for half in ("order[:SAMPLES]", "order[SAMPLES:]"))
        if self.problem == "image":
            lines.append(f"train, validation = {train}, {validation}")
            lines.append("return DataSource(train, validation, ('a', 'b', 'c'), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))")
        else:
            lines.append(f"return {train}, {validation}")
        return "def make_data():\n" + textwrap.indent("\n".join(lines), "    ")

    def _split(self) -> str:
        """`order`: the rows, of which the first SAMPLES are trained on."""
        if self.wrong_habit == "split":
            self.unseeded("a split without a seed", "another one on|contents", differs_when_continued=True)
            return "order = np.random.default_rng().permutation(SAMPLES + VALIDATED).tolist()"
        how = self.one_of("fixed", "random_split", "numpy", "random", "randperm")
        self.has(f"split: {how}")
        return {
            "fixed": "order = list(range(SAMPLES + VALIDATED))",
            "random_split": (
                "halves = random_split(range(SAMPLES + VALIDATED), [SAMPLES, VALIDATED])\n"
                "order = [*halves[0].indices, *halves[1].indices]"
            ),
            "numpy": "order = np.random.permutation(SAMPLES + VALIDATED).tolist()",
            "random": "order = list(range(SAMPLES + VALIDATED))\nrandom.shuffle(order)",
            "randperm": "order = torch.randperm(SAMPLES + VALIDATED).tolist()",
        }[how]

    def _collate(self) -> str:
        self.x, self.y = (part.format("batch") for part in TAKEN[self.form])
        needed = self.problem == "tokens" or self.form == "dataclass" or self.wrong_habit == "collate"
        if self.wrong_habit == "dataclass":
            self.expect("refused", "samples of a dataclass, and no collate for them", "collate")
            return ""
        if self.kind == "memory" or not (needed or self.maybe(0.45)):
            return ""
        self.case.settings["data"]["collate"] = "mine:collate"
        x, y = (part.format("s") for part in TAKEN[self.form])
        lines = []
        if self.wrong_habit == "collate":
            self.expect("refused", "a collate changes the number of samples", "samples")
            lines.append(f"samples = {self.one_of('samples[:-1] or samples', '[*samples, samples[0]]')}")
        ys = f"[torch.as_tensor({y}) for s in samples]"
        if self.problem == "tokens":
            xs = f"[torch.as_tensor({x}).long() for s in samples]"
            lines.append(f"x = torch.nn.utils.rnn.pad_sequence({xs}, batch_first=True)")
            lines.append(f"y = torch.nn.utils.rnn.pad_sequence({ys}, batch_first=True, padding_value=-100)")
        else:
            numpy, tensors = (
                f"torch.as_tensor(np.stack([{x} for s in samples]))",
                f"[torch.as_tensor({x}) for s in samples]",
            )
            lines.append(f"x = {self.one_of(numpy, f'torch.stack({tensors})')}")
            lines.append(f"y = torch.stack({ys})")
            if self.x_dtype in ("float32", "float64") and self.maybe(0.5):
                lines.append(f"x = x * (0.5 + {self.drawn('collate')})")
        self.form = self.one_of(*self._forms())
        needs_cast = self.form == "dataclass" and self.x_dtype.startswith("float") and self.x_dtype != self.dtype
        if needs_cast and not self.either("a dataclass as batch whose numbers have another dtype than the model"):
            self.form = "named tuple"
        self.has(f"collate: {self.form}")
        self.x, self.y = (part.format("batch") for part in TAKEN[self.form])
        return "def collate(samples):\n" + textwrap.indent("\n".join([*lines, f"return {MADE[self.form]}"]), "    ")
