"""Every way in which Python code reaches other code is followed, in packages as in modules.

Each case is a package of a few lines: its stage calls something, and an edit of what is called has
to move the code hash, while an edit of what lies beside it must not.
"""

import ast
import shutil
import subprocess
import sys

import pytest

from pipeline.job import definitions, reach, source

MAIN = "\n\ndef main():\n    {}\n"
ONE, TWO = "return 'wanted'", "return 'edited'"


def clear() -> None:
    """Forget what was read: a process hashes a file once."""
    caches = (source._facts, source._remembered, source._module, source.reached)
    for function in (*caches, source._templates, source._version, source._ours):
        function.cache_clear()


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """(files, stage) -> the code hash of a stage in a package of these files alone."""
    monkeypatch.setattr(source, "PIPELINE", tmp_path / "pipeline")

    def code(files: dict[str, str], stage: str = "stage") -> str:
        shutil.rmtree(tmp_path / "pipeline", ignore_errors=True)
        for name, text in {"__init__": "", **files}.items():
            file = tmp_path / "pipeline" / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        clear()
        return source.job_code(stage)

    yield code
    clear()


def stage(body: str, imports: str = "from pipeline import deep") -> str:
    return imports + MAIN.format(body)


WANTED = f"\n\ndef wanted():\n    {ONE}\n"
METHOD = f"    def wanted(self):\n        {ONE}\n"
# name -> (files, file, old): `old`, where it stands in `file`, is reached by the stage
REACHED = {
    "singledispatch": (
        {"stage": stage("deep.show(1)"),
         "deep": "import functools\n\n@functools.singledispatch\ndef show(x): ...\n\n"
                 f"@show.register\ndef _(x: int):\n    {ONE}\n"}, "deep"),
    "singledispatchmethod": (
        {"stage": stage("deep.A().show(1)"),
         "deep": "import functools\n\nclass A:\n    @functools.singledispatchmethod\n"
                 f"    def show(self, x): ...\n\n    @show.register\n    def _(self, x: int):\n"
                 f"        {ONE}\n"}, "deep"),
    "a registry filled by a decorator": (
        {"stage": stage("deep.KINDS['a']()"),
         "deep": "KINDS = {}\n\ndef register(f):\n    KINDS[f.__name__] = f\n    return f\n\n"
                 f"@register\ndef a():\n    {ONE}\n"}, "deep"),
    "a registry filled from another module": (
        {"stage": stage("deep.KINDS['a']()", "from pipeline import deep, more"),
         "deep": "KINDS = {}\n\ndef register(f):\n    KINDS[f.__name__] = f\n    return f\n",
         "more": f"from pipeline.deep import register\n\n@register\ndef a():\n    {ONE}\n"},
        "more"),
    "a registry of methods": (
        {"stage": stage("deep.KINDS['a'](None)"),
         "deep": "KINDS = {}\n\ndef register(f):\n    KINDS[f.__name__] = f\n    return f\n\n"
                 f"class A:\n    @register\n    def a(self):\n        {ONE}\n"}, "deep"),
    "a registry of classes": (
        {"stage": stage("deep.KINDS['A']().wanted()"),
         "deep": "KINDS = {}\n\ndef register(f):\n    KINDS[f.__name__] = f\n    return f\n\n"
                 f"@register\nclass A:\n{METHOD}"}, "deep"),
    "a dict of functions": (
        {"stage": stage("deep.KINDS['a']()"),
         "deep": f"def a():\n    {ONE}\n\nKINDS = {{'a': a}}\n"}, "deep"),
    "a dict filled by items": (
        {"stage": stage("deep.KINDS['a']()"),
         "deep": f"def a():\n    {ONE}\n\nKINDS = {{}}\nKINDS['a'] = a\n"}, "deep"),
    "a name that is assigned for what it does": (
        {"stage": stage("deep.KINDS"),
         "deep": f"KINDS = {{}}\n\ndef a():\n    {ONE}\n\n_ = KINDS.update(a=a)\n"}, "deep"),
    "a decorator": (
        {"stage": stage("deep.f()"),
         "deep": f"def made(f):\n    {ONE}\n\n@made\ndef f(): ...\n"}, "deep"),
    "a decorator with arguments": (
        {"stage": stage("deep.f()"),
         "deep": f"def size():\n    {ONE}\n\ndef made(n):\n    return lambda f: n\n\n"
                 "@made(size())\ndef f(): ...\n"}, "deep"),
    "a decorator of the class itself": (
        {"stage": stage("deep.A().f()"),
         "deep": f"class A:\n    def _made(f):\n        {ONE}\n\n    @_made\n"
                 "    def f(self): ...\n"},
        "deep"),
    "a method under another name": (
        {"stage": stage("deep.A().f()"),
         "deep": f"class A:\n    def _f(self):\n        {ONE}\n\n    f = _f\n"}, "deep"),
    "a property made of a method": (
        {"stage": stage("deep.A().f"),
         "deep": f"class A:\n    def _f(self):\n        {ONE}\n\n    f = property(_f)\n"}, "deep"),
    "a property": (
        {"stage": stage("deep.A().wanted"), "deep": f"class A:\n    @property\n{METHOD}"}, "deep"),
    "a property in a pattern": (
        {"stage": stage("match deep.A():\n        case deep.A(wanted=1): ..."),
         "deep": f"class A:\n    @property\n{METHOD}"}, "deep"),
    "a setter": (
        {"stage": stage("deep.A().f = 1"),
         "deep": "class A:\n    @property\n    def f(self): ...\n\n    @f.setter\n"
                 f"    def f(self, x):\n        {ONE}\n"}, "deep"),
    "__post_init__": (
        {"stage": stage("deep.A()"),
         "deep": "from dataclasses import dataclass\n\n@dataclass\nclass A:\n    n: int = 1\n\n"
                 f"    def __post_init__(self):\n        {ONE}\n"}, "deep"),
    "model_post_init": (
        {"stage": stage("deep.A()"),
         "deep": "from pydantic import BaseModel\n\nclass A(BaseModel):\n"
                 f"    def model_post_init(self, context):\n        {ONE}\n"}, "deep"),
    "an enum's _missing_": (
        {"stage": stage("deep.A(2)"),
         "deep": "from enum import Enum\n\nclass A(Enum):\n    x = 1\n\n    @classmethod\n"
                 f"    def _missing_(cls, value):\n        {ONE}\n"}, "deep"),
    "a default factory": (
        {"stage": stage("deep.A()"),
         "deep": "from dataclasses import dataclass, field\n" + WANTED + "\n@dataclass\nclass A:\n"
                 "    n: list = field(default_factory=wanted)\n"}, "deep"),
    "a default argument": (
        {"stage": stage("deep.f()"), "deep": WANTED + "\ndef f(x=wanted()): ...\n"}, "deep"),
    "__init_subclass__": (
        {"stage": stage("deep.KINDS['A']().wanted()"),
         "deep": "KINDS = {}\n\nclass Base:\n    def __init_subclass__(cls):\n"
                 f"        KINDS[cls.__name__] = cls\n\nclass A(Base):\n{METHOD}"}, "deep"),
    "__subclasses__": (
        {"stage": stage("deep.Base.__subclasses__()[0]().wanted()",
                        "from pipeline import deep, more"),
         "deep": "class Base: ...\n",
         "more": "from pipeline.deep import Base\n\nclass Middle(Base): ...\n\n"
                 f"class A(Middle):\n{METHOD}"},
        "more"),
    "a metaclass": (
        {"stage": stage("deep.KINDS['A']().wanted()"),
         "deep": "KINDS = {}\n\nclass Meta(type):\n    def __new__(*args):\n        return 1\n\n"
                 f"class A(metaclass=Meta):\n{METHOD}"}, "deep"),
    "a statement in a class": (
        {"stage": stage("deep.KINDS[0]()"),
         "deep": f"KINDS = []\n\ndef f():\n    {ONE}\n\nclass A:\n    KINDS.append(f)\n"}, "deep"),
    "a method put in from outside": (
        {"stage": stage("deep.A().f()"),
         "deep": f"class A:\n    def f(self): ...\n\ndef g(self):\n    {ONE}\n\nA.f = g\n"},
        "deep"),
    "a method put in by another module": (
        {"stage": stage("deep.A().f()", "from pipeline import deep, patched"),
         "deep": "class A:\n    def f(self): ...\n",
         "patched": f"from pipeline.deep import A\n\ndef g(self):\n    {ONE}\n\nA.f = g\n"},
        "patched"),
    "a method put in by a function": (
        {"stage": stage("deep.patch()"),
         "deep": f"class A: ...\n{WANTED}\ndef patch():\n    setattr(A, 'f', wanted)\n"}, "deep"),
    "an overridden method": (
        {"stage": stage("deep.B().run()"),
         "deep": "class A:\n    def run(self):\n        return self.step()\n\n"
                 f"    def step(self): ...\n\nclass B(A):\n    def step(self):\n        {ONE}\n"},
        "deep"),
    "an inherited method": (
        {"stage": stage("deep.B().wanted()"), "deep": f"class A:\n{METHOD}\nclass B(A): ...\n"},
        "deep"),
    "getattr with an f-string": (
        {"stage": stage("kind = 'ted'\n    getattr(deep.A(), f'wan{kind}')()"),
         "deep": f"class A:\n{METHOD}"}, "deep"),
    "getattr with a sum": (
        {"stage": stage("kind = 'wan'\n    getattr(deep.A(), kind + 'ted')()"),
         "deep": f"class A:\n{METHOD}"}, "deep"),
    "getattr with a format": (
        {"stage": stage("getattr(deep.A(), 'wan{}'.format('ted'))()"),
         "deep": f"class A:\n{METHOD}"}, "deep"),
    "getattr with a name of an f-string": (
        {"stage": stage("kind = 'ted'\n    name = f'wan{kind}'\n    getattr(deep.A(), name)()"),
         "deep": f"class A:\n{METHOD}"}, "deep"),
    "getattr before the class is known": (
        {"stage": stage("call(f'wan{1}', deep.make())") + "\n\ndef call(name, x):\n"
                  "    getattr(x, f'wan{name}')\n",
         "deep": f"def make():\n    return A()\n\nclass A:\n{METHOD}"}, "deep"),
    "getattr of a module": (
        {"stage": stage("getattr(deep, 'wan' + 'ted')()"), "deep": WANTED}, "deep"),
    "methodcaller": (
        {"stage": stage("operator.methodcaller('wanted')(deep.A())",
                        "import operator\n\nfrom pipeline import deep"),
         "deep": f"class A:\n{METHOD}"}, "deep"),
    "attrgetter of a path": (
        {"stage": stage("operator.attrgetter('a.wanted')(deep.A())",
                        "import operator\n\nfrom pipeline import deep"),
         "deep": f"class A:\n{METHOD}"}, "deep"),
    "globals": (
        {"stage": stage("globals()['wan' + 'ted']()") + WANTED}, "stage"),
    "eval": ({"stage": stage("eval('wanted()')") + WANTED}, "stage"),
    "a class's __dict__": (
        {"stage": stage("deep.A.__dict__['wanted'](1)"), "deep": f"class A:\n{METHOD}"}, "deep"),
    "vars of a class": (
        {"stage": stage("vars(deep.A)['wanted'](1)"), "deep": f"class A:\n{METHOD}"}, "deep"),
    "a function as a string": (
        {"stage": stage("call('pipeline.deep:wanted')", "from json import loads as call"),
         "deep": WANTED}, "deep"),
    "a module as a string": (
        {"stage": stage("importlib.import_module('pipeline.deep').wanted()", "import importlib"),
         "deep": WANTED}, "deep"),
    "an import inside a function": (
        {"stage": stage("from pipeline.deep import wanted\n    wanted()", ""), "deep": WANTED},
        "deep"),
    "an import for what it does": (
        {"stage": stage("import pipeline.deep", ""),
         "deep": WANTED + "\nprint(wanted())\n"}, "deep"),
    "an import of a module for what it does": (
        {"stage": stage("1", "import pipeline.deep"), "deep": WANTED + "\nprint(wanted())\n"},
        "deep"),
    "an import inside a method": (
        {"stage": stage("deep.A().f()"),
         "deep": "class A:\n    def f(self):\n        from pipeline.more import wanted as w\n\n"
                 "        return w()\n", "more": WANTED}, "more"),
    "a conditional import, the first": (
        {"stage": "try:\n    from pipeline.deep import wanted\nexcept ImportError:\n"
                  "    from pipeline.other import wanted" + MAIN.format("wanted()"),
         "deep": WANTED, "other": "def wanted(): ...\n"}, "deep"),
    "a conditional import, the second": (
        {"stage": "try:\n    from pipeline.other import wanted\nexcept ImportError:\n"
                  "    from pipeline.deep import wanted" + MAIN.format("wanted()"),
         "deep": WANTED, "other": "def wanted(): ...\n"}, "deep"),
    "a conditional import inside a function": (
        {"stage": stage("if 1:\n        from pipeline.deep import f\n    else:\n"
                        "        from pipeline.more import f\n    f()", ""),
         "deep": f"def f():\n    {ONE}\n", "more": "def f(): ...\n"}, "deep"),
    "a conditional definition": (
        {"stage": stage("deep.f()"),
         "deep": f"import sys\n\nif sys.platform:\n    def f():\n        {ONE}\n"
                 "else:\n    f = None\n"},
        "deep"),
    "a definition over an import": (
        {"stage": stage("deep.wanted()"),
         "deep": "from pipeline.more import wanted\n\nold = wanted\n" + WANTED,
         "more": "def wanted(): ...\n"}, "deep"),
    "an import that is wrapped": (
        {"stage": stage("deep.f()"),
         "deep": "from pipeline.more import f\n" + WANTED + "\nf = wanted\n",
         "more": "def f(): ...\n"}, "deep"),
    "a star": (
        {"stage": "from pipeline.deep import *" + MAIN.format("wanted()"), "deep": WANTED}, "deep"),
    "a star behind a star": (
        {"stage": "from pipeline.deep import *" + MAIN.format("wanted()"),
         "deep": "from pipeline.more import *\n", "more": WANTED}, "more"),
    "a star behind an import": (
        {"stage": stage("deep.wanted()"), "deep": "from .more import *\n", "more": WANTED}, "more"),
    "a name handed on": (
        {"stage": stage("deep.handed()"),
         "deep": "from pipeline.more import wanted as handed\n", "more": WANTED}, "more"),
    "an annotation in quotes": (
        {"stage": stage("deep.f()"),
         "deep": f"def f(x: 'A | None'):\n    x.wanted()\n\nclass A:\n{METHOD}"}, "deep"),
    "a partial": (
        {"stage": stage("functools.partial(deep.wanted)()",
                        "import functools\n\nfrom pipeline import deep"),
         "deep": WANTED}, "deep"),
    "a module of the frame as a value": (
        {"stage": stage("getattr(cli, 'Job')()", "from pipeline.job import cli"),
         "job/cli": f"class Job:\n    def __init__(self):\n        {ONE}\n"}, "job/cli"),
    "a class on one of another package": (
        {"stage": stage("deep.A()"),
         "deep": f"import json\n\nclass A(json.JSONEncoder):\n{METHOD}"}, "deep"),
    "what a module attribute is made by": (
        {"stage": stage("deep.anything"),
         "deep": f"def __getattr__(name):\n    {ONE}\n"}, "deep"),
}  # fmt: skip


@pytest.mark.parametrize("files, where", REACHED.values(), ids=REACHED)
def test_what_is_reached_moves_the_hash(hashed, files, where):
    before = hashed(files)
    assert files[where].count(ONE) == 1
    assert hashed(files | {where: files[where].replace(ONE, TWO)}) != before
    beside = files[where] + "\n\ndef beside():\n    return 1\n"
    if "globals" not in files["stage"] and "eval(" not in files["stage"]:
        whole = "import_module" in files["stage"] or "getattr(deep, " in files["stage"]
        whole |= "getattr(cli" in files["stage"] or "deep.anything" in files["stage"]
        assert (hashed(files | {where: beside}) != before) is whole


def test_modules_that_hand_a_name_to_each_other_end(hashed):
    files = {"stage": stage("deep.f()"), "deep": "from .more import *\n\ndef f(): ...\n"}
    files["more"] = f"from .deep import *\n\ndef f():\n    {ONE}\n"
    before = hashed(files)
    assert hashed(files | {"more": files["more"].replace(ONE, TWO)}) != before
    turning = {"deep": "from .more import f\n", "more": "from .deep import f\n"}
    assert hashed(files | turning)


def test_code_of_one_text_that_leads_elsewhere_counts():
    """`f` of two modules reads the same, and each calls a `g` of its own."""
    found = {}
    for m in "ab":
        found[m] = definitions.facts(f"from pipeline.{m}2 import g\n\ndef f():\n    g()\n")
        text = f"def g():\n    return h()\n\ndef h():\n    return '{m}'\n"
        found[f"{m}2"] = definitions.facts(text)

    def walk(c: str) -> reach.Walk:
        head = f"import pipeline.{c} as c\nfrom pipeline import a, b"
        files = {**found, "stage": definitions.facts(stage("c.f()\n    a.f()\n    b.f()", head))}
        start = [("pipeline.stage", "main")]
        return reach.Walk(lambda name: files.get(name.removeprefix("pipeline."))).run(start)

    assert walk("a").reached.keys() == walk("b").reached.keys()
    assert sorted(walk("a").reached.values()) != sorted(walk("b").reached.values())


# --- modules in folders --------------------------------------------------------------------

PACKAGES = {
    "stages/stage": "from ..job import cli\nfrom . import near\nfrom .near import close\n"
    "from pipeline.spec.paper import Section\nfrom pipeline.deep import far\n\n"
    "def main():\n    cli.run()\n    near.near()\n    close()\n    far()\n    Section().kept()\n",
    "stages/near": "from .. import top\n\ndef near():\n    return top.x()\n\ndef close(): ...\n"
    "\ndef idle(): ...\n",
    "stages/__init__": "from .near import close\n",
    "job/__init__": "",
    "job/cli": "def run(): ...\n\nclass Job: ...\n",
    "deep/__init__": "from .inner import far\nfrom .inner.more import *\n",
    "deep/inner/__init__": "from ...top import x as far\n\nprint('inner')\n",
    "deep/inner/more": "def more(): ...\n",
    "spec/__init__": "",
    "spec/paper": "class Section:\n    n: int = 1\n\n    def kept(self):\n        return 1\n",
    "top": "def x():\n    return 1\n\ndef y():\n    return 1\n",
}


@pytest.mark.parametrize(
    "file, old, new, moves",
    [
        ("top", "x():\n    return 1", "x():\n    return 2", True),
        ("top", "y():\n    return 1", "y():\n    return 2", False),
        ("stages/near", "near():\n", "near(n=1):\n", True),
        ("stages/near", "close(): ...", "close(n=1): ...", True),
        ("stages/near", "idle(): ...", "idle(n=1): ...", False),
        ("stages/__init__", "import close\n", "import close\n\nprint()\n", True),
        ("deep/inner/__init__", "'inner'", "'outer'", True),
        ("deep/inner/more", "more(): ...", "more(n=1): ...", False),
        ("deep/inner/more", "def more", "print()\n\n\ndef more", True),
        ("spec/paper", "n: int = 1", "n: int = 2", False),
        ("spec/paper", "return 1", "return 2", True),
        ("job/cli", "run(): ...", "run(n=1): ...", False),
        ("job/cli", "class Job: ...", "class Job:\n    n = 1", False),
    ],
)
def test_packages_are_followed_by_relative_names(hashed, monkeypatch, file, old, new, moves):
    monkeypatch.setitem(reach.FRAME, "pipeline.job.cli", {"run"})
    before = hashed(PACKAGES, "stages.stage")
    assert PACKAGES[file].count(old) == 1
    after = hashed(PACKAGES | {file: PACKAGES[file].replace(old, new)}, "stages.stage")
    assert (after != before) is moves


def test_two_files_of_one_text_in_two_packages_import_their_own_neighbours(hashed):
    text = "from .size import n\n\ndef f():\n    return n()\n"
    files = {"a/f": text, "b/f": text, "a/size": "def n(): ...", "b/size": "def n(): ...  # b"}
    files |= {
        "a/__init__": "",
        "b/__init__": "",
        "a/stage": "from .f import f" + MAIN.format("f()"),
    }
    before = hashed(files, "a.stage")
    assert hashed(files | {"b/size": "def n():\n    return 1\n"}, "a.stage") == before
    assert hashed(files | {"a/size": "def n():\n    return 1\n"}, "a.stage") != before


def test_made_up_packages_do_what_they_are_said_to(tmp_path):
    """The package above is one that Python imports, so its relative names are right."""
    for name, text in {"__init__": "", **PACKAGES}.items():
        file = tmp_path / "pipeline" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    code = "from pipeline.stages import stage; stage.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "inner\n", "")


def test_the_sections_of_a_paper_are_those_of_spec():
    for name in ("pipeline.spec.paper", "pipeline.spec.sae", "pipeline.spec.sae"):
        assert reach.is_spec(name)
    assert not reach.is_spec("pipeline.models.splice")


def calls(text: str) -> list[ast.Call]:
    return [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]


def test_no_module_of_ours_imports_what_it_names_while_it_runs():
    """That could not be followed: `import_module(f"pipeline.{name}")`, exec of a text.

    Only the front door does, by the table that gives the hash its stages.
    """
    for file in sorted({*source.PIPELINE.rglob("*.py")} - {source.PIPELINE / "__main__.py"}):
        for call in calls(file.read_text()):
            called = ast.unparse(call.func)
            given = all(isinstance(a, ast.Constant) for a in call.args)
            imports = called.split(".")[-1] in ("import_module", "__import__")
            assert not imports or given, (file, call.lineno)
            assert called not in ("exec", "compile", "builtins.exec"), file
