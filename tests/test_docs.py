"""README and docs/: short enough, up to date with the results, and naming only what is there."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md"]
HISTORY = ROOT / "docs" / "log.md"  # names what there was then
COMMAND = re.compile(r"(?:python|bash) ((?:\w+/)*\w+\.(?:py|sh))((?: +(?:\\\n *)?[^\s`|]+)*)")


def test_readme_is_the_front_door():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "![" in text.split("\n- **")[0]  # the picture comes before the three bullets


def test_tables_are_those_of_the_results():
    done = subprocess.run([sys.executable, ROOT / "bench" / "tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}: run python bench/tables.py"


def test_a_table_that_is_out_of_date_is_told(tmp_path):
    sys.path.insert(0, str(ROOT / "bench"))
    import tables

    page = "before\n<!-- table memory -->\n| old |\n<!-- end -->\nafter\n"
    made = tables.rewritten(page)
    assert made != page and made.startswith("before\n<!-- table memory -->\n| passages |")
    assert made.endswith("|\n<!-- end -->\nafter\n") and tables.rewritten(made) == made
    with pytest.raises(KeyError, match="nothing"):
        tables.rewritten("<!-- table nothing -->\n<!-- end -->")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != HISTORY], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_are_there_and_know_their_flags(page):
    for script, words in COMMAND.findall(page.read_text()):
        assert (ROOT / script).is_file(), script
        if script.endswith(".py"):
            source = (ROOT / script).read_text() + (ROOT / "bench" / "measure.py").read_text()
            for flag in re.findall(r" --(?:no-)?(\w+)", words):
                assert f'"--{flag}"' in source, f"{script} --{flag}"
