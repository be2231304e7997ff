"""The datasets that are known by their columns, as a page: `python docs/data.py` writes docs/data.md from the table in autosloth/data/schemas.py."""

from __future__ import annotations

from pathlib import Path

from autosloth.data.recognise import COLUMN_NAMES, FORMS
from autosloth.data.schemas import SCHEMAS
from autosloth.data.transforms import TRANSFORMS, WHOLE

HEAD = """# Which rows are understood

Every row ends as one of four: learnt as it stands; changed and counted by name; dropped and counted by name; refused. Columns that nothing
reads are named (`data: not used: ...`). `data/preview.html` shows each count with an example. This page is made from the tables that
recognition reads (`python docs/data.py`; a test holds it to them).

## By common names

Capitals, blanks and dashes do not count. The first name that is there wins; `columns: {name: meaning}` wins over all of it, and `ignore`
leaves a column alone.

| meaning | names |
|---|---|
"""


def line(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cell.replace('|', ' or ') for cell in cells)} |\n"


def page() -> str:
    """The page as Markdown."""
    text = HEAD + "".join(line(f"`{role}`", ", ".join(f"`{name}`" for name in names)) for role, names in COLUMN_NAMES.items())  # fmt: skip
    text += "\n| form | needs | takes besides |\n|---|---|---|\n"
    for road, forms in FORMS.items():
        text += "".join(line(f"{form} ({road})", ", ".join(needed), ", ".join(besides) or "") for form, needed, besides in forms)  # fmt: skip
    text += "\n## By the columns of much-used datasets\n\nA form of more columns wins over one of fewer; turns and pairs by common names win over all.\n"
    for road, title in (("sft", "One answer each (SFT, self-play)"), ("dpo", "Preferences (DPO)")):
        text += f"\n### {title}\n\n| form | columns | how it is read | known from |\n|---|---|---|---|\n"
        for schema in SCHEMAS:
            if schema.road == road:
                columns = [*schema.columns.values(), *(f"({names})" for names in schema.optional.values())]
                how = ({**TRANSFORMS, **WHOLE}[schema.transform].__doc__ or "").strip().splitlines()[0]
                text += line(schema.name, ", ".join(columns), how, schema.known_from)
    return text


if __name__ == "__main__":
    Path(__file__).with_name("data.md").write_text(page(), encoding="utf-8")
