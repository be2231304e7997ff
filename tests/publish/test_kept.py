"""What a person wrote into a card on the Hub survives ours; what they left as we wrote it does not stand in the way of ours."""

import re

import pytest
import yaml

from autosloth.publish.front_matter import card, split
from autosloth.publish.kept import END, keep_theirs, marked

MATTER = {"license": "mit", "tags": ["autosloth", "sft"], "language": ["no"], "license_link": "https://a.b"}
OLD = marked(MATTER, "# Sloth\n\nOld figures.")
NEW = marked(MATTER | {"license": "llama3.2", "tags": ["autosloth", "dpo"]}, "# Sloth\n\nNew figures.")


def edited(old, new):
    assert old in OLD
    return OLD.replace(old, new)


def test_an_untouched_card_is_replaced_and_nothing_changes_twice():
    assert keep_theirs(NEW, OLD) == NEW
    assert keep_theirs(NEW, NEW) == NEW


def test_text_before_and_after_ours_is_kept_and_ours_is_new():
    theirs = edited("<!-- autosloth begins", "Read this first.\n\n<!-- autosloth begins") + "\n## Thanks\n\nTo Mila.\n"
    kept = keep_theirs(NEW, theirs)
    assert kept.index("Read this first.") < kept.index("New figures.") < kept.index("## Thanks\n\nTo Mila.\n")
    assert "Old figures." not in kept and kept.count(END) == 1
    assert keep_theirs(NEW, kept) == kept


@pytest.mark.parametrize(
    "old, new, key, expected",
    [
        ("license: mit", "license: mit", "license", "llama3.2"),
        ("license: mit", "license: apache-2.0", "license", "apache-2.0"),
        ("license: mit", "license: mit\nthumbnail: a.png", "thumbnail", "a.png"),
        ("license: mit\n", "", "license", None),
        ("- sft", "- sft\n- mine", "tags", ["autosloth", "mine", "dpo"]),
        ("- autosloth\n", "", "tags", ["dpo"]),
        ("- 'no'", "- no", "language", ["no"]),
        ("license: mit", "license: mit\ndate: 2026-11-30", "date", "2026-11-30"),
    ],
)
def test_a_key_that_was_touched_is_theirs_and_another_is_ours(old, new, key, expected):
    kept = keep_theirs(NEW, edited(old, new))
    assert split(kept)[0].get(key) == expected
    assert split(keep_theirs(NEW, kept))[0].get(key) == expected
    assert yaml.safe_load(kept.split("---")[1])["license_link"] == "https://a.b"


MINE = """\
# about the numbers
version: 1.10  # mine
when: "2026-11-30"
empty:
code: 0x1F
notes: |
  # no comment
  two lines

# for the Hub's search
widget:
- text: 'Who?'   # asked often
"""


def matter_of(text):
    return text.split("---\n")[1]


def test_what_a_person_wrote_into_the_front_matter_keeps_its_form_and_its_comments():
    kept = keep_theirs(NEW, edited("license_link:", MINE + "license_link:"))
    assert MINE in kept and split(kept)[0]["license"] == "llama3.2" and split(kept)[0]["version"] == 1.1
    assert keep_theirs(NEW, kept) == kept and MINE in keep_theirs(OLD, kept)
    assert keep_theirs(NEW, edited("license_link:", MINE.replace("\n", "\r\n") + "license_link:")) == kept


@pytest.mark.parametrize(
    "old, new, lines",
    [
        ("license: mit", "license: MIT   # as agreed", "license: MIT   # as agreed\n"),
        ("license: mit", "# agreed\nlicense: mit # as agreed", "# agreed\n# as agreed\nlicense: llama3.2\n"),
        ("- sft", "- sft\n# more\n- 'mine' # yes", "tags:\n- autosloth\n# more\n- 'mine' # yes\n- dpo\n"),
        ("- autosloth\n- sft", "  - autosloth\n  # more\n  - mine", "tags:\n  - autosloth\n  # more\n  - mine\n  - dpo\n"),
        ("tags:\n- autosloth\n- sft", "tags: [autosloth, sft, mine] # few", "# few\ntags:\n- autosloth\n- mine\n- dpo\n"),
        ("license_link: https://a.b", "license_link: 'https://a.b' # here", "license_link: 'https://a.b' # here\n"),
        ("license_link: https://a.b", "license_link: https://a.b\n# the end", "license_link: https://a.b\n# the end\n"),
        ("- 'no'", '- "no" # Norwegian', 'language:\n- "no" # Norwegian\n'),
    ],
)  # fmt: skip
def test_lines_of_the_front_matter_are_kept_and_comments_where_the_value_is_ours(old, new, lines):
    kept = keep_theirs(NEW, edited(old, new))
    assert lines in matter_of(kept) and keep_theirs(NEW, kept) == kept


def of_a_loss(value):
    return marked(MATTER | {"model-index": [{"name": "m", "results": [{"loss": value}]}]}, "# Sloth")


@pytest.mark.parametrize(
    "old, new",
    [("---\n<!--", "# checked by Ana\n---\n<!--"), ("---\n<!--", "\n# checked by Ana\n\n# and Bo\n---\n<!--"), ("  results:", "  # checked by Ana\n  results: # and Bo")],
)  # fmt: skip
def test_comments_below_the_last_key_and_within_what_is_replaced_are_kept_once(old, new):
    theirs = of_a_loss(0.5).replace(old, new, 1)
    kept = keep_theirs(of_a_loss(0.4), theirs)
    assert kept.count("# checked by Ana") == kept.count("- loss: 0.4") == 1 and kept.count("# and Bo") == new.count(
        "# and Bo"
    )
    assert keep_theirs(of_a_loss(0.4), kept) == kept
    again = keep_theirs(of_a_loss(0.3), kept)
    assert again == kept.replace("loss: 0.4", "loss: 0.3").replace(
        kept[kept.index("<!-- a") :], again[again.index("<!-- a") :]
    )


def test_comments_of_items_that_are_gone_go_above_what_comes_in_their_place():
    kept = keep_theirs(NEW, edited("- sft", "# how\n- sft # once\n- 'mine'"))
    assert "tags:\n- autosloth\n# how\n# once\n- 'mine'\n- dpo\n" in matter_of(kept)
    assert keep_theirs(NEW, kept) == kept


def test_comments_of_a_key_that_we_wrote_and_do_not_write_any_more_are_kept():
    less = marked({key: value for key, value in MATTER.items() if key != "license_link"}, "# Sloth")
    kept = keep_theirs(less, edited("license_link:", "# by Mila\nlicense_link:"))
    assert "# by Mila\n" in matter_of(kept) and "license_link" not in split(kept)[0]


@pytest.mark.parametrize(
    "theirs, key, value",
    [("{license: mit, mine: 1.10} # braces\n", "mine", 1.1), ("license: &it mit\nmine: *it\n", "mine", "mit")],
)
def test_front_matter_whose_lines_cannot_stand_keeps_what_it_says(theirs, key, value):
    kept = keep_theirs(NEW, f"---\n{theirs}---\n" + split(OLD)[1])
    assert split(kept)[0][key] == value and keep_theirs(NEW, kept) == kept


@pytest.mark.parametrize("text", ["# Mine\n\nMy words.", "---\nlicense: [mit\n---\nMy words.", "My words."])
def test_a_person_s_own_card_stands_below_ours(text):
    kept = keep_theirs(NEW, text)
    assert kept.index(END) < kept.index("My words.") and split(kept)[0]["license"] == "llama3.2"
    assert keep_theirs(NEW, kept) == kept


def test_the_front_matter_of_a_person_s_own_card_goes_before_ours():
    kept, _ = split(keep_theirs(NEW, "---\r\nlicense: apache-2.0\r\ntags: [mine]\r\n---\r\nMy words.\r\n"))
    assert kept["license"] == "apache-2.0" and kept["tags"] == ["mine", "autosloth", "dpo"]


@pytest.mark.parametrize("damaged", [END, "<!-- autosloth begins"])
def test_where_a_mark_is_gone_no_word_is_lost(damaged):
    kept = keep_theirs(NEW, edited(damaged, "My words."))
    assert "My words." in kept and "New figures." in kept


def test_a_card_without_its_front_matter_gets_ours_again():
    assert keep_theirs(NEW, split(OLD)[1]) == NEW


def test_our_mark_in_a_sample_does_not_end_ours():
    old = marked(MATTER, f"# Sloth\n\n    {END}\n\nOld figures.")
    assert keep_theirs(NEW, old + "\nTheirs.\n") == NEW + "\nTheirs.\n"


BLOCK = split(OLD)[1]
MARK = BLOCK.split("\n")[0]


@pytest.mark.parametrize(
    "theirs",
    [
        OLD + "\nWORDS\n\n" + BLOCK + "\nAFTER\n",
        OLD + f"\nWORDS\n\nThe line {END} ends it.\n\nAFTER\n",
        OLD + f"\nWORDS\n\n{MARK}\n\nAFTER\n",
        OLD + f"\nWORDS\n\n    {MARK}\n    {END}\n\nAFTER\n",
        edited(BLOCK, f"{MARK}\nWORDS\n\n{BLOCK}") + "\nAFTER\n",
        OLD.replace(END, "WORDS") + "\n" + BLOCK + "\nAFTER\n",
        edited(BLOCK, f"{END}\nWORDS\n{BLOCK}\nAFTER\n"),
        OLD + "\nWORDS\n" + 3 * BLOCK + "\nAFTER\n",
    ],
)
def test_where_marks_stand_twice_no_word_is_lost_and_nothing_grows(theirs):
    kept = keep_theirs(NEW, theirs)
    assert "WORDS" in kept and "AFTER" in kept and kept.count("New figures.") == 1
    assert keep_theirs(NEW, kept) == kept
    again = keep_theirs(OLD, kept)
    assert "WORDS" in again and "AFTER" in again and "New figures." not in again
    assert keep_theirs(NEW, again) == kept


def results(*values):
    return {"model-index": [{"name": "my-run", "results": [{"metric": value} for value in values]}]}


@pytest.mark.parametrize(
    "added",
    [
        lambda index: [*index, {"name": "theirs", "results": [{"metric": 9}]}],
        lambda index: [{"name": "my-run", "results": [{"metric": 9}, *index[0]["results"]]}],
    ],
)
def test_old_results_of_ours_go_where_a_person_added_one(added):
    old, new = (marked(MATTER | results(*values), "# Sloth") for values in ((1, 2), (3, 2)))
    matter, text = split(old)
    theirs = card(matter | {"model-index": added(matter["model-index"])}, text)
    kept = keep_theirs(new, theirs)
    metrics = [result["metric"] for entry in split(kept)[0]["model-index"] for result in entry["results"]]
    assert sorted(metrics) == [2, 3, 9] and keep_theirs(new, kept) == kept


def test_the_mark_of_an_older_card_is_read():
    old = re.sub(",[0-9a-f]{8}", "", OLD)
    assert old != OLD and keep_theirs(NEW, old) == NEW
