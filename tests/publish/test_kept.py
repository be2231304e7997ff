"""What a person wrote into a card on the Hub survives ours; what they left as we wrote it does not stand in the way of ours."""

import re

import pytest
import yaml

from autosloth.publish.kept import END, card, keep_theirs, marked, split

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
