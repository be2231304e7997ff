"""CSV and TSV on the Hub are read as local ones are: whatever their delimiter, and no row with cells too many shifts its columns."""

import pytest
from support.commands import quick_process
from support.faults import told_of
from support.hub_server import HubServer

from autosloth.data.load import load_raw
from autosloth.errors import DataError
from autosloth.settings import SFTSettings

CSV = "question,answer\n1 + 1?,2\n2 + 2?,4\n"
ROWS = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
CARD = "---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n  sep: '/'\n---\n"
READ = {
    "commas": {"train.csv": CSV},
    "semicolons": {"data/train.csv": CSV.replace(",", ";"), "data/test.csv": "a;b\n1;2\n"},
    "tabs": {"train.tsv": CSV.replace(",", "\t")},
    "tabs-in-csv": {"train.csv": CSV.replace(",", "\t")},
    "by-its-card": {"README.md": CARD, "rows.csv": CSV.replace(",", "/")},
}
TOO_MANY = {
    "in-each-row": ({"train.csv": "question,answer\n1 + 1?,2,3\n2 + 2?,4,5\n"}, "Line 2 of team/in-each-row/train.csv has 3 cells under 2 columns."),
    "in-one-row": ({"train.csv": CSV + "3 + 3?,6,7\n"}, "Line 4 of team/in-one-row/train.csv has 3 cells under 2 columns."),
    "in-tsv": ({"train.tsv": CSV.replace(",", "\t") + "3 + 3?\t6\t7\n"}, "Line 4 of team/in-tsv/train.tsv has 3 cells"),
    "by-its-card-too": ({"README.md": CARD, "rows.csv": "question/answer\n1 + 1?/2/3\n2 + 2?/4/5\n"}, "team/by-its-card-too cannot be read (Length of header"),
}  # fmt: skip


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The rows of a dataset on the Hub, by the name of its case; or the two sentences of the problem."""
    home = tmp_path_factory.mktemp("home")
    with HubServer() as hub:
        for name, files in (READ | {name: files for name, (files, _) in TOO_MANY.items()}).items():
            hub.add_repo("dataset", f"team/{name}", {path: text.encode() for path, text in files.items()})
        with quick_process(hub.env(home)) as pool:
            yield lambda name: pool.submit(told_of, "dataset", hub.url, home, f"team/{name}").result()[0]


@pytest.mark.parametrize("name", READ)
def test_a_table_on_the_hub_is_read_whatever_its_delimiter(read, name):
    rows = read(name)
    assert [{column: str(cell) for column, cell in row.items()} for row in rows] == ROWS


@pytest.mark.parametrize("name, words", [(name, words) for name, (_, words) in TOO_MANY.items()], ids=TOO_MANY)
def test_a_row_with_more_cells_than_the_header_is_a_named_problem(read, name, words):
    what, todo = read(name)
    assert words in what and todo.endswith(".")


@pytest.mark.parametrize("name", ["in-each-row", "in-one-row", "in-tsv"])
def test_so_it_is_in_a_file_on_this_disk(tmp_path, name):
    ((path, text),) = TOO_MANY[name][0].items()
    (tmp_path / path).write_text(text)
    with pytest.raises(DataError, match=r"Line \d of .* has 3 cells under 2 columns"):
        list(load_raw(SFTSettings(model="demo", dataset=str(tmp_path / path)))[0])
