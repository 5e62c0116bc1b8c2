"""The documentation against the source: messages, links, commands, and the worked example of a method.

A page rots in silence. Where one of these fails, the page has to change, not the test: see the comments at the top of
`docs/troubleshooting.md` and of `INTERNAL` below.
"""

import ast
import contextlib
import doctest
import functools
import importlib
import io
import pathlib
import re
import runpy
import shlex
import sys

import pytest

from wkd_jax import compare, main, registry
from wkd_jax.command import COMMANDS
from wkd_jax.report.published import TABLES
from wkd_jax.training import metrics

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
PAGES = list(dict.fromkeys(PAGES))

# --- messages -------------------------------------------------------------------------------------------------------

# Texts of exceptions that no row of docs/troubleshooting.md has, by reason: (file, beginning of the text), where <...>
# stands for anything, as on the page.
INTERNAL: dict[str, list[tuple[str, str]]] = {
    "caught, and told as a part of another message, which is on the page": [
        ("wkd_jax/data/coco_tfds.py", "objects need bbox"),
        ("wkd_jax/data/tfds_stream.py", "<type>: <error>"),
        ("wkd_jax/training/metrics.py", "not an object with"),
        ("wkd_jax/training/snapshot.py", "<file> has no sealed content"),
        ("wkd_jax/training/snapshot.py", "<file> is not as it was written"),
        ("wkd_jax/training/snapshot.py", "<n> of <n> arrays in <folder> are not as they were saved"),
        ("wkd_jax/training/snapshot.py", "<file> cannot be read"),
        ("wkd_jax/training/snapshot.py", "<file> could not be read"),
        ("wkd_jax/weights/download.py", "only <n> of <n> bytes"),
        ("wkd_jax/weights/download.py", "its SHA-256 begins"),
        ("wkd_jax/weights/download.py", "the server"),
        ("wkd_jax/weights/download.py", "the connection broke"),
        ("wkd_jax/weights/state.py", "it holds <type>, not numbers"),
        ("wkd_jax/weights/state.py", "an array in it says shape"),
    ],
    "its text is another one's, with the name of a key or file before it": [
        ("wkd_jax/data/prepare.py", "<set>: <error>"),
        ("wkd_jax/data/tfds.py", "<set>: <key>=<split>: "),
        ("wkd_jax/methods/distiller.py", "methods.distiller: <error>"),
        ("wkd_jax/report/read.py", "<file>: "),
        ("wkd_jax/weights/archive.py", "<text>"),
        ("wkd_jax/weights/load.py", "<text>"),
        ("wkd_jax/weights/match.py", "<text>"),
        ("wkd_jax/weights/torch_file.py", "<text>"),
    ],
    "the page quotes what may stand in its first field instead": [
        ("wkd_jax/data/mix.py", "<key>: must be even"),
        ("wkd_jax/interrelation/store.py", "<file>: <what> at [<i>, <j>]"),
    ],
    "of functions that only this package calls, with what it has checked before": [
        ("wkd_jax/data/augment.py", "images: need uint8"),
        ("wkd_jax/data/image.py", "image: need"),
        ("wkd_jax/data/mix.py", "images: need"),
        ("wkd_jax/data/randomness.py", "seed="),
        ("wkd_jax/training/checkpoint.py", "abstract_state needs"),
        ("wkd_jax/training/checkpoint.py", "two arrays of the state"),
        ("wkd_jax/training/checkpoint.py", "which="),
        ("wkd_jax/training/progress.py", "start_step="),
    ],
}

FIELD = "\0"


def template(node: ast.AST) -> str:
    """The text that an expression makes, with FIELD for whatever is known only when it runs."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(template(part) for part in parts)
        case ast.FormattedValue(value=value):
            return template(value)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left) + template(right)
        case ast.Call(func=ast.Name(id="unknown") | ast.Attribute(attr="unknown"), args=[what, *_]):
            return f"unknown {template(what)} {FIELD}: {FIELD}Valid: {FIELD}"  # registry.unknown
    return FIELD


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Of the package and the configs, by path from the root."""
    files = [*(ROOT / "wkd_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(files)}


def raised() -> list[tuple[str, int, str]]:
    """(file, line, template) of every exception that is made with a text.

    One that comes from a function (`raise damaged(...)`) is counted where that function makes it.
    """
    return [
        (file, node.lineno, template(node.args[0]))
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node.args
        if isinstance(node.func, ast.Name | ast.Attribute)
        and re.search(r"(Error|Preempted)$", ast.unparse(node.func))
        and "numpy" not in ast.unparse(node.func)
    ]


@functools.cache
def texts() -> list[str]:
    """The template of every text in the source, raised, printed or otherwise; pieces of longer ones too."""
    nodes = [node for tree in trees().values() for node in ast.walk(tree)]
    found = [template(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp | ast.Call)]
    return [*{text for text in found if text.strip(FIELD)}]


def pattern(message: str) -> re.Pattern:
    """What begins like a message of the page, in which <...> stands for anything up to the next colon and space."""
    return re.compile(r"(?:(?!: ).)*".join(map(re.escape, re.split("<[^<>]*>", message))), re.DOTALL)


def quoted() -> list[str]:
    """The messages in the first column of the tables of docs/troubleshooting.md."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    cells = re.findall(r"^\|(.*?)(?<!\\)\|", page, re.MULTILINE)
    return [message.replace("\\|", "|") for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def test_templates_and_patterns():
    text = template(ast.parse('f"data.{key}={x!r}: " + unknown("value", x, known)', mode="eval").body)
    assert text == f"data.{FIELD}={FIELD}: unknown value {FIELD}: {FIELD}Valid: {FIELD}"
    assert pattern("<key>=<value>: unknown value").match(text)
    assert not pattern("<key>=<value>: unknown key").match(text)
    assert not pattern("key=<value>").match(text)


def test_every_quoted_message_is_in_the_source():
    stale = [message for message in quoted() if not any(map(pattern(message).match, texts()))]
    assert stale == [], "docs/troubleshooting.md quotes what the source no longer says"
    vague = [message for message in quoted() if len(re.sub(r"<[^<>]*>|\W", "", message)) < 6]
    assert vague == [], "docs/troubleshooting.md quotes messages that could be anything"


def test_every_raised_message_is_on_the_page():
    rows = [pattern(message) for message in quoted()]
    internal = [(file, pattern(begins)) for entries in INTERNAL.values() for file, begins in entries]
    used, missing = set(), []
    for file, line, text in raised():
        if any(row.match(text) for row in rows):
            continue
        known = [entry for entry in internal if entry[0] == file and entry[1].match(text)]
        used.update(known)
        if not known:
            missing.append(f"{file}:{line}: {text.replace(FIELD, '<>')}")
    assert missing == [], "docs/troubleshooting.md has no row for these: add one, or name them in INTERNAL"
    assert [entry for entry in internal if entry not in used] == [], (
        "INTERNAL names what is not raised, or is on the page"
    )


# --- links and commands ---------------------------------------------------------------------------------------------

CODE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def named(page: pathlib.Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: pathlib.Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{named(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{named(page)}: {link} has no such heading"


def test_the_index_has_every_page():
    index = (ROOT / "docs/README.md").read_text()
    missing = [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and page.name not in index
    ]
    assert missing == []


@functools.cache
def command(module: str):
    """The `main` that `python -m wkd_jax.MODULE` runs."""
    assert f"wkd_jax.{module}" in {known for known, _ in COMMANDS.values()}, module
    found = importlib.import_module(f"wkd_jax.{module}")
    return found.main if hasattr(found, "main") else importlib.import_module(f"wkd_jax.{module}.__main__").main


@functools.cache
def help_of(module: str, *words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        command(module)([*words, "--help"])
    assert ended.value.code == 0, words
    return out.getvalue()


PLACEHOLDERS = ("FILE", "NAME", "NAME-or-FILE")
SPELLINGS = re.compile(r"(?:python -m wkd_jax\.|wkd-jax )(.+)")


def commands(page: pathlib.Path) -> list[list[str]]:
    """The words behind `python -m wkd_jax.` or `wkd-jax ` of every command of a page, a module's name first."""
    blocks = [text for _, language, text in CODE.findall(page.read_text()) if language == "sh"]
    inline = re.findall(r"`((?:python -m wkd_jax\.|wkd-jax )[^`]+)`", page.read_text())
    lines = [line for text in (*blocks, *inline) for line in text.replace("\\\n", " ").splitlines()]
    pieces = [piece for line in lines for piece in re.split(r"&&|;|\|", line)]
    found = []
    for piece in pieces:
        if match := re.match(r"\s*" + SPELLINGS.pattern, piece):
            words = shlex.split(match[1], comments=True)
            if "wkd-jax " in piece:
                if words[0].startswith("--"):
                    words = ["main", *words] if words[0] != "--help" else []
                else:
                    words[0] = COMMANDS.get(words[0], (f"wkd_jax.{words[0]}",))[0].removeprefix("wkd_jax.")
            found += [words] if words else []
    return found


def check_command(module: str, *words: str) -> None:
    """Flags exist, and a config is loaded as the command would, whose file is there."""
    sub = words[:1] if module in ("data", "weights") and words and not words[0].startswith("-") else ()
    for word in words:
        if word.startswith("--") and not word.startswith("--config."):
            assert word.partition("=")[0] in help_of(module, *sub), word
    if "--config" not in words:
        if "--table" in words:
            assert words[words.index("--table") + 1].partition(":")[0] in {*TABLES, "NAME"}
        return
    argument = words[words.index("--config") + 1]
    overrides = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
    if "..." in argument or "KEY=VALUE" in overrides or argument.partition(":")[0] in PLACEHOLDERS:
        return
    if module == "compare":
        methods = words[words.index("--methods") + 1 :]
        last = next((i for i, word in enumerate(methods) if word.startswith("--")), len(methods))
        compare.plan(argument, methods[:last], 1, overrides)
    else:
        main.load_config(argument, overrides)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "adding_a_method.md"], ids=named)
def test_commands(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        try:
            check_command(*words)
        except (AssertionError, ValueError, KeyError) as error:
            raise AssertionError(f"{named(page)}: python -m wkd_jax.{shlex.join(words)}: {error!r}") from error


# --- the worked example of docs/adding_a_method.md ------------------------------------------------------------------


@pytest.fixture(name="example")
def _example(tmp_path, monkeypatch):
    """A folder with the page's files where their first lines say, whose methods are the package's too."""
    page = (ROOT / "docs/adding_a_method.md").read_text()
    blocks = [text for _, language, text in CODE.findall(page) if language == "python"]
    files = {match[1]: text for text in blocks if (match := re.match(r"# (\S+\.py)\n", text))}
    row = files["configs/digits_wkd.py"].partition("\n")[2]
    config = (ROOT / "configs/digits_wkd.py").read_text().replace("METHODS = {\n", "METHODS = {\n" + row)
    for path, text in {**files, "configs/digits_wkd.py": config}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    import wkd_jax.methods

    monkeypatch.setattr(wkd_jax.methods, "__path__", [*wkd_jax.methods.__path__, str(tmp_path / "wkd_jax/methods")])
    monkeypatch.chdir(tmp_path)
    registry.entries.cache_clear()
    yield tmp_path
    registry.entries.cache_clear()
    sys.modules.pop("wkd_jax.methods.sp", None)
    vars(wkd_jax.methods).pop("sp", None)


def test_the_example_trains_in_the_normal_loop(example, capsys, monkeypatch):
    monkeypatch.setattr(main.report, "write", lambda directory: directory)  # has tests of its own, and takes a while
    small = ["data.image_size=8", "student.name=resnet8", "epochs=1", "optimizer.warmup=0", "log_every=1"]
    changes = [*small, "steps=2", *(f"teacher.train.{change}" for change in (*small, "steps=1"))]
    command = ["--config", "configs/digits_wkd.py:method=sp", "--workdir", "run"]
    assert main.main([*command, *(f"--config.{change}" for change in changes)]) == 0, capsys.readouterr().err
    steps = [line for line in metrics.read(example / "run/metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["sp/similarity"] > 0 and line["sp/similarity/weight"] == 100 for line in steps)


def test_the_example_passes_its_own_test_and_its_commands_are_right(example):
    for words in commands(ROOT / "docs/adding_a_method.md"):
        check_command(*words)
    tests = runpy.run_path(str(example / "tests/methods/sp_test.py"))
    for name, test in tests.items():
        if name.startswith("test_"):
            marks = getattr(test, "pytestmark", [])
            for case in marks[0].args[1] if marks else [()]:
                test(*case)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    examples = finder.find(sys.modules["wkd_jax.methods.sp"])
    assert sum(map(len, (each.examples for each in examples))) > 0
    assert [result for each in examples if (result := runner.run(each)).failed] == []
