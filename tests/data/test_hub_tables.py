"""CSV and TSV on the Hub are read whatever their delimiter, their cells typed as `datasets` types them, and no row with cells too many shifts its columns."""

from collections import Counter

import pytest
from support.commands import quick_process
from support.faults import told_of
from support.hub_server import HubServer

from autosloth.data.load import load_raw
from autosloth.data.recognise import recognise
from autosloth.data.transforms import TRANSFORMS, WHOLE
from autosloth.errors import DataError
from autosloth.settings import SFTSettings

CSV = "question,answer\n1 + 1?,2\n2 + 2?,4\n"
ROWS = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
CARD = "---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n  sep: '/'\n---\n"
READ = {
    "commas": {"train.csv": CSV},
    "semicolons": {"data/train.csv": CSV.replace(",", ";"), "data/test.csv": "question;answer\n1;2\n"},
    "tabs": {"train.tsv": CSV.replace(",", "\t")},
    "tabs-in-csv": {"train.csv": CSV.replace(",", "\t")},
    "semicolons-and-commas": {
        "train.csv": "question;answer\n1 + 1?;2\n2 + 2?;4\n",
        "test.csv": "question;answer\na, b, c;2\n",
    },
    "commas-at-the-end": {"train.csv": "question,answer\n1 + 1?,2,\n2 + 2?,4,\n"},
    "quotes-in-tabs": {"train.tsv": 'question\tanswer\n"1 + 1?"\t"2"\n"2 + 2?"\t4\n'},
    "by-its-card": {"README.md": CARD, "rows.csv": CSV.replace(",", "/")},
}
TOO_MANY = {
    "in-each-row": {"train.csv": "question,answer\n1 + 1?,2,3\n2 + 2?,4,5\n"},
    "in-one-row": {"train.csv": CSV + "3 + 3?,6,7\n"},
    "in-tsv": {"train.tsv": CSV.replace(",", "\t") + "3 + 3?\t6\t7\n"},
    "by-its-card-too": {"README.md": CARD, "rows.csv": "question/answer\n1 + 1?/2/3\n2 + 2?/4/5\n"},
}
CHOICES = (
    "question,opa,opb,opc,opd,cop\n"
    + "Which fruit?,apple,pear,plum,fig,4\n" * 3
    + "How many legs has a stool?,2,3,4,5,2\n"
)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The rows of a dataset on the Hub, by the name of its case; or the two sentences of the problem."""
    home = tmp_path_factory.mktemp("home")
    with HubServer() as hub:
        for name, files in (READ | TOO_MANY | {"choices": {"train.csv": CHOICES}}).items():
            hub.add_repo("dataset", f"team/{name}", {path: text.encode() for path, text in files.items()})
        with quick_process(hub.env(home)) as pool, quick_process(hub.env(home) | {"HF_HUB_OFFLINE": "1"}) as offline:
            yield lambda name, cached=False: (offline if cached else pool).submit(told_of, "dataset", hub.url, home, f"team/{name}").result()[0]  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_table_on_the_hub_is_read_whatever_its_delimiter(read, name):
    rows = read(name)
    assert [{column: str(cell) for column, cell in row.items()} for row in rows] == ROWS


@pytest.mark.parametrize("name", ["commas", "semicolons", "tabs", "semicolons-and-commas"])
def test_it_is_read_offline_a_second_time(read, name):
    assert read(name) == read(name, cached=True)


def test_numbers_stay_numbers(read):
    rows = read("choices")
    assert [row["cop"] for row in rows] == [4, 4, 4, 2]
    assert completions(rows) == ["D. fig"] * 3 + ["B. 3"]


@pytest.mark.parametrize("name", TOO_MANY)
def test_a_row_with_more_cells_than_the_header_is_a_named_problem(read, name):
    what, todo = read(name)
    assert f"team/{name} " in what and ("more cells than" in what or "Expected 2 fields in line 4, saw 3" in what)
    assert todo.startswith("Download its files")


@pytest.mark.parametrize("name", ["in-each-row", "in-one-row", "in-tsv"])
def test_so_it_is_in_a_file_on_this_disk(tmp_path, name):
    ((path, text),) = TOO_MANY[name].items()
    with pytest.raises(DataError, match=r"Line \d of .* has 3 cells under 2 columns"):
        read_here(tmp_path, path, text)


def read_here(folder, name, text):
    (folder / name).write_text(text)
    return list(load_raw(SFTSettings(model="demo", dataset=str(folder / name)))[0])


def completions(rows):
    found = recognise(rows, {}, "choices")
    return [TRANSFORMS[found.schema.transform](found.named(row), Counter(), "best")[0]["completion"] for row in rows]


def test_choices_by_number_in_a_csv_are_told_from_their_texts_by_all_rows(tmp_path):
    assert completions(read_here(tmp_path, "x.csv", CHOICES)) == ["D. fig"] * 3 + ["B. 3"]
    from_zero = CHOICES.replace("fig,4", "fig,3").replace("apple", "0").replace("fig,3", "fig,0", 1)
    assert completions(read_here(tmp_path, "y.csv", from_zero)) == ["A. 0", "D. fig", "D. fig", "C. 4"]
    texts = "question,a,b,c,answer\n1+1?,3,2,1,2\n9-1?,8,7,6,8\n"
    assert completions(read_here(tmp_path, "z.csv", texts)) == ["B. 2", "A. 8"]


def test_choices_that_may_be_meant_by_text_or_by_number_are_refused(tmp_path):
    rows = read_here(tmp_path, "x.csv", "question,a,b,c,answer\n1+1?,3,2,1,2\n2+1?,3,2,1,3\n")
    with pytest.raises(DataError, match="may be numbers of choices as well: 3 of 3, 2, 1"):
        recognise(rows, {}, "x.csv")


def test_a_message_that_a_csv_says_is_not_deleted_is_learnt(tmp_path):
    text = "message_id,parent_id,role,text,deleted\nq,,prompter,Ask?,False\na,q,assistant,Say.,False\nb,q,assistant,Gone.,True\n"
    rows = read_here(tmp_path, "x.csv", text)
    found = recognise(rows, {}, "x.csv")
    ((_, chat),), _ = WHOLE[found.schema.transform]([found.named(row) for row in rows], "best")
    assert [turn["content"] for turn in chat["messages"]] == ["Ask?", "Say."]


def test_cells_of_a_tsv_lose_the_quotes_that_csv_gives_them_and_no_others(tmp_path):
    quoted = 'question\tanswer\nq\t"say ""hi"""\n5" pipe\t"b"\n'
    assert [row["answer"] for row in read_here(tmp_path, "x.tsv", quoted)] == ['say "hi"', "b"]
    raw = quoted + '"Hi" he said\tc\n'
    assert [row["answer"] for row in read_here(tmp_path, "y.tsv", raw)] == ['"say ""hi"""', '"b"', "c"]
