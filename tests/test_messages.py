"""Every sentence that the program says stands in messages.txt, to be read as somebody would who does not know the code."""

import ast
import re
from pathlib import Path

import autosloth
from autosloth import errors

PACKAGE = Path(autosloth.__file__).parent
LISTED = Path(__file__).with_name("messages.txt")
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.AutoSlothError)}  # fmt: skip
SAYING = {"say", "warn", "fail"}
INSIDE = {"road", "roads", "facts", "wing", "pydantic", "regex", "traceback", "exception", "assert"}


def text_of(node, assigned):
    """The text of an expression as it stands in the code, its values in braces; of a name, all that its function gives it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, assigned) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.IfExp):
        return f"{text_of(node.body, assigned)} | {text_of(node.orelse, assigned)}"
    if isinstance(node, ast.Name) and node.id in assigned:
        return " | ".join(text_of(value, {}) for value in assigned[node.id])
    return f"{{{ast.unparse(node)}}}"


def functions(tree):
    """The functions of a module that stand in no other, and what stands in none."""
    return [node for part in tree.body for node in (part.body if isinstance(part, ast.ClassDef) else [part])]


def assignments(function):
    """By name, the values that a function gives it, of pairs too."""
    found = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            (target,) = node.targets[-1:]
            pairs = zip(target.elts, node.value.elts, strict=False) if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) else [(target, node.value)]  # fmt: skip
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    found.setdefault(name.id, []).append(value)
    return found


def messages():
    """(file, kind, texts) of each error and each line that a run prints, in the order of the code."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for function in functions(ast.parse(path.read_text())):
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                if name in ERRORS | SAYING and call.args:
                    assigned = assignments(function)
                    texts = [text_of(argument, assigned) for argument in call.args]
                    yield path.relative_to(PACKAGE).as_posix(), name, texts


def listing():
    """messages.txt: by file, an error as its two sentences, a line of a run behind a dash."""
    lines, last = [], None
    for file, name, texts in messages():
        if file != last:
            lines += ["", f"== {file}"]
            last = file
        lines += [f"- {texts[0]}"] if name in SAYING else ["! " + texts[0], *("  " + text for text in texts[1:])]
    return "\n".join(lines[1:]) + "\n"


def test_every_message_is_listed():
    """After a wanted change run `python tests/test_messages.py` and read what it changed in messages.txt."""
    assert listing() == LISTED.read_text()


def test_every_error_has_a_sentence_that_says_what_is_wrong_and_one_that_says_what_to_do():
    said = [(file, texts) for file, name, texts in messages() if name in ERRORS and not texts[0].startswith("{*")]
    assert len(said) > 100
    for file, texts in said:
        assert len(texts) == 2, (file, texts)
        for alternative in (part for text in texts for part in text.split(" | ")):
            assert alternative.endswith((".", "}")) and not alternative.startswith(" "), (file, texts)


def test_no_message_speaks_of_the_inside_of_the_program():
    for file, name, texts in messages():
        words = set(re.findall(r"[a-z]+", re.sub(r"\{.*?\}|`.*?`", "", " ".join(texts).lower())))
        assert not words & INSIDE, (file, name, texts)


if __name__ == "__main__":
    LISTED.write_text(listing())
