"""Writes docs/plan.md from the tables of plan fields: python docs/make_plan.py"""

import textwrap
from pathlib import Path
from typing import get_args

from qcompress.plan.fields import FIELDS, Fields, PlanField, Scheme
from qcompress.plan.plan import TABLE_KINDS
from qcompress.plan.toml import value_text
from qcompress.plan.training import TRAINING_FIELDS

HEAD = f"""\
<!-- Written by docs/make_plan.py from qcompress/plan/fields.py and qcompress/plan/training.py. -->
# The plan

A plan says what happens to each weight. It is a TOML file (`--plan FILE`), a `Plan` in Python, or options:

```toml
version = 1

[default]            # all weights
bits = 2

[kind.depthwise]     # weights of a kind of layer
bits = 8

[kind.last]          # the last weight; `first` is the first one
bits = 4

[name."layer1.*"]    # weights whose names match a pattern: *, ? and [abc]
skip = true

[training]           # how `finetune` trains; nothing else reads it
epochs = 12
```

Kinds are {", ".join(f"`{kind}`" for kind in TABLE_KINDS)}.
A `parameter` is a tensor of several axes that no layer takes as its weight: a table of positions, a stack of experts. A
weight that is computed from the model's own tensors alone (masked, normalized, scaled, updated) is computed once, and
goes by the name of the largest parameter behind it.

`qcompress inspect MODEL` lists the names and kinds of a model. Tables merge field by field: `default`, then `kind`,
then `name`; of two tables of the same sort the later one wins. Options replace what `[default]` sets. A pattern that
matches no tensor, an unknown key and a setting that applies to no weight are errors.

`export --dry-run` shows the settings of each weight, where each was set, and the exact sizes. `--save-plan FILE` writes
the resolved plan, which gives the same file again. [combinations.md](combinations.md) lists the rules for int8 compute.

## Fields

| field | option | values | if unset |
|---|---|---|---|
"""


TRAINING = """
## Training

The fields of `[training]`, which `qcompress finetune` reads, and its options. What is unset has the default of its
method and width; `--save-plan` writes all of them. [finetuning.md](finetuning.md) shows how they are used.

| field | option | values | if unset | meaning |
|---|---|---|---|---|
"""


def page(fields: Fields = FIELDS) -> str:
    """Return the page for a table of fields."""
    rows = "".join(f"{row(field)}\n" for field in fields)
    training = "".join(f"{row(field)} {field.meaning} |\n" for field in TRAINING_FIELDS)
    return f"{HEAD}{rows}\n" + "\n".join(section(field) for field in fields) + TRAINING + training


def row(field: PlanField) -> str:
    """Return the row of a field: its name, option, values and default."""
    option = f"`{field.option}`" if field.has_option else "-"
    values = str(field.values).replace("|", "\\|")
    return f"| `{field.name}` | {option} | {values} | {field.unset or 'must be set'} |"


def section(field: PlanField) -> str:
    """Return what the page says about a field beside its row."""
    sentences = [field.meaning]
    if len(field.schemes) < len(get_args(Scheme)):
        schemes = " or ".join(f'`"{scheme}"`' for scheme in field.schemes)
        sentences.append(f"Applies to `scheme` = {schemes} only.")
        if field.harmless is not None:
            sentences.append(f"With other schemes it must be unset or `{value_text(field.harmless)}`.")
    if field.kinds:
        kinds = " or ".join(field.kinds)
        sentences.append(
            f"Applies to weights of kind {kinds}. Set in `[default]` or by its option, it is ignored for others; set "
            "in another table, it is an error for them."
        )
    if not field.trains:
        sentences.append("Supported by post-hoc compression only, not by `prepare`.")
    elif field.trains == "palette":
        sentences.append("Supported by post-hoc compression, and by `prepare` with the method `dkm`.")
    text = textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False)
    return f"### `{field.name}`\n{text}\n"


if __name__ == "__main__":
    (Path(__file__).parent / "plan.md").write_text(page(), encoding="utf-8")
