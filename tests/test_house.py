"""The size and the shape of the seven files and of the README. As a script it prints the table."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {
    "lines": {"losses": 225, "model": 1172, "phantoms": 571, "data": 2256, "pretrain": 758, "finetune": 500,
              "eval": 1655},
    "lines in all": 7136,
    "bytes in all": 374_500,
    "columns": 110,
    "wide": 100,                            # columns beyond which a line counts as wide
    "share of wide lines": 0.04,             # of all lines of the seven files
    "width": 52.5,                          # bytes a line, the mean of all
    "function": 60,                         # lines
    "long functions": {"flags": None, "pretrain.main": 157, "finetune.train": 170},     # None: any length
    "imports": {"losses": (), "model": (), "phantoms": (), "data": ("phantoms",),
                "eval": ("losses", "model", "data"),
                "pretrain": ("losses", "model", "data", "eval", "phantoms"),
                "finetune": ("losses", "model", "data", "eval", "phantoms", "pretrain")},
    "README": {"lines": 220, "columns": 100, "words": 2300},
}
FILES = tuple(LIMITS["lines"])
MACHINE_PATH = r"(?<![\w.])/(work|tmp|root|home|mnt|opt|usr|var|Users)\b|[A-Z]:\\"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def measure(name):
    """{lines, bytes, widest (columns), wide (lines)} of a file"""
    text = read(name)
    widths = [len(line) for line in text.splitlines()]
    return {"lines": len(widths), "bytes": len(text.encode()), "widest": max(widths),
            "wide": sum(width > LIMITS["wide"] for width in widths)}


def functions(file):
    """{name: lines} of all functions of a file, those in classes and functions too ("outer.inner")"""
    lengths = {}

    def visit(node, names):
        for child in ast.iter_child_nodes(node):
            inner = names
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = (*names, child.name)
                if not isinstance(child, ast.ClassDef):
                    lengths[".".join(inner)] = child.end_lineno - child.lineno + 1
            visit(child, inner)

    visit(ast.parse(read(f"{file}.py")), ())
    return lengths


def most_lines(file, function):
    long = LIMITS["long functions"]
    return long.get(f"{file}.{function}", long.get(function, LIMITS["function"]))


def imports(file):
    """Which of the seven files a file imports, at its top or anywhere else"""
    names = set()
    for node in ast.walk(ast.parse(read(f"{file}.py"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & set(FILES)


def total():
    measures = [measure(f"{file}.py") for file in FILES]
    return {name: sum(row[name] for row in measures) for name in ("lines", "bytes", "wide")}


def test_no_other_file_stands_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_file(file):
    found = measure(f"{file}.py")
    assert found["lines"] <= LIMITS["lines"][file]
    assert found["widest"] <= LIMITS["columns"]


@pytest.mark.parametrize("file", FILES)
def test_functions_are_short(file):
    lengths = functions(file)
    too_long = {}
    for name, lines in lengths.items():
        most = most_lines(file, name)
        if most is not None and lines > most:
            too_long[name] = lines
    assert too_long == {}


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file):
    assert imports(file) <= set(LIMITS["imports"][file])


def test_all_files_together():
    found = total()
    assert found["lines"] <= LIMITS["lines in all"]
    assert found["bytes"] <= LIMITS["bytes in all"]
    assert found["wide"] <= LIMITS["share of wide lines"] * found["lines"]
    assert found["bytes"] <= LIMITS["width"] * found["lines"]


def test_readme():
    found, limits = measure("README.md"), LIMITS["README"]
    assert found["lines"] <= limits["lines"]
    assert found["widest"] <= limits["columns"]
    assert len(read("README.md").split()) <= limits["words"]


@pytest.mark.parametrize("name", ["README.md", *(f"{file}.py" for file in FILES)])
def test_no_path_of_a_machine(name):
    assert [line for line in read(name).splitlines() if re.search(MACHINE_PATH, line)] == []


def table():
    """The measures of every file beside their limits, as text"""
    limits = LIMITS["lines"]
    rows = [("file", "lines", "at most", "bytes", "a line", "widest", "> 100", "longest function")]
    for file in FILES:
        found, lengths = measure(f"{file}.py"), functions(file)
        bounded = [name for name in lengths if most_lines(file, name) is not None]
        longest = max(bounded, key=lambda name: lengths[name] / most_lines(file, name))
        rows.append((f"{file}.py", found["lines"], limits[file], found["bytes"],
                     f"{found['bytes'] / found['lines']:.1f}", found["widest"],
                     f"{found['wide'] / found['lines']:.1%}",
                     f"{longest} {lengths[longest]} of {most_lines(file, longest)}"))
    found = total()
    rows.append(("sum", found["lines"], LIMITS["lines in all"], found["bytes"],
                 f"{found['bytes'] / found['lines']:.1f}", "", f"{found['wide'] / found['lines']:.1%}", ""))
    found, words = measure("README.md"), len(read("README.md").split())
    rows.append(("README.md", found["lines"], LIMITS["README"]["lines"], found["bytes"],
                 f"{found['bytes'] / found['lines']:.1f}", found["widest"], "",
                 f"{words} words of {LIMITS['README']['words']}"))
    return "\n".join("{:12} {:>6} {:>8} {:>8} {:>7} {:>7} {:>7}  {}".format(*row).rstrip() for row in rows)


if __name__ == "__main__":
    print(table())
