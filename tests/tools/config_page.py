"""Write docs/config.md, the page of all settings, from the fields of distloop/config/settings.py and their help.

python -m tests.tools.config_page
"""

from __future__ import annotations

import itertools

from distloop.config.help import Setting, settings_help
from tests.tools.ranks import REPOSITORY

PAGE = REPOSITORY / "docs" / "config.md"
HEAD = """\
# All settings

- To set one on the command line: `--optim.lr 0.1 --train.epochs 5 --model.args.width 64`
- To set them in a file: `--config my.yaml`, with the sections below as its keys; the command line wins over it
- To start from a recipe: `--config configs/digits.yaml`; [these](#the-recipes) are there
- To see all settings in a terminal: `python -m distloop.train --help`
- To give no value where one is optional: `null`

This page is generated from the help of the settings: `python -m tests.tools.config_page`. The defaults are those of
`configs/digits.yaml`.

```yaml
# my.yaml
data: {name: digits, args: {shift: 1}}
model: cnn # a section that is one word is its name
optim: {name: sgd, lr: 0.1}
schedule: {name: cosine, warmup_steps: 20}
batch: {global_size: 64, micro_size: 32}
train: {epochs: 2}
```

```sh
python -m distloop.train --config my.yaml --optim.lr 0.05
python -m distloop.train --help
```

## The recipes

Each recipe in `configs/` is a file with settings. The first lines of those from elsewhere name the source, and each
difference from it.

| config | what | needs |
|---|---|---|
| `linear_regression.yaml` | `nn.Linear`, mean squared error, SGD on scikit-learn's diabetes data | seconds |
| `digits.yaml` | a small CNN on scikit-learn's digits: the default | seconds |
| `fashion_mnist.yaml` | a small CNN on 60 000 garments | 30 MB download |
| `cifar10.yaml` | ResNet-18 in its 32-pixel form | 170 MB download, a GPU |
| `imagenet.yaml` | torchvision's ResNet-50, 90 epochs on `data/imagenet/{train,val}/CLASS/` | the pictures, GPUs |
| `resnet50.yaml` | the same with torchvision's newer recipe, 600 epochs | the pictures, GPUs, days |

## Names, arguments, secrets

`data`, `model` and `task` take `args`, which go to the data set, model or task; one of them is set by its name, as
`--model.args.width 64`. If the file has arguments for another model than `--model` names, `--model.args '{}'` takes
them away. A setting that is text takes `env:NAME`, too: its value is then read from the environment, and recorded as
`env:NAME` ([secrets](tracking.md#secrets)).

## Paths

`--config`, `runs_dir`, `init_from` and `data.root` are paths. `~` is your home folder in them, and `$NAME` and
`${NAME}` are variables of the environment, also where no shell fills them in, as in a file or in `--data.root=~/data`.
A variable that is not set, or empty, is refused, and so are defaults as a shell has them (`${NAME:-/tmp}`). A relative
path begins in the folder in which you start; it stays there if your code changes the folder or a variable. The run
records a path as you gave it. Arguments in `args` go to your code as they are, and so does a `data.root` that is an
address, as `s3://…`, or `env:NAME`.

## What a value means

- A file is YAML 1.2 in UTF-8: `no`, `off`, `yes` and `on` are words, as in `precision: no`; `true` and `false` are
  truth values. In `args`, where your code gets the word, the run says so at its start. `1e-3` and `0777` are numbers,
  dates are words, and `null` or nothing is no value.
- A key that is there twice in one section is refused, and so are tabs that indent, merges (`<<`), tags such as
  `!!python/object`, and `true` in place of a number.
- On the command line, `--compile`, `--compile=true` and `--compile True` are the same, and so are `--optim.betas 0.9
  0.95`, `--optim.betas '[0.9, 0.95]'` and `--optim.betas '(0.9, 0.95)'`. `1e1` is 10 for a setting that takes an
  integer, `None` is `null`. An empty word, as from a variable of the shell that is not set, is refused, and so is one
  from a script with the line ends of Windows. In `args`, `"''"` is the empty text. `--tracking.tags` takes `a b` and
  `'[a, b]'`.
- A setting of `optim` or `schedule` that has no effect beside the others is refused, such as `optim.momentum` with
  `adamw`: a new run would train otherwise than it says. Of others, such as `tracking.group` without W&B, the run says
  so at its start: `without effect: …`.
- Optimizers, groups of parameters and schedules of your own: [optimizers.md](optimizers.md).
"""


def page() -> str:
    """The text of docs/config.md."""
    parts = [HEAD]
    for section, settings in itertools.groupby(settings_help(), lambda setting: setting.key.rpartition(".")[0]):
        parts += [f"\n## {section or 'The run'}\n\n| setting | values | default | |\n|---|---|---|---|\n"]
        parts += map(row, settings)
    return "".join(parts)


def row(setting: Setting) -> str:
    cells = [f"`{setting.key}`", setting.type, f"`{setting.default}`", " ".join(setting.help.split())]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
