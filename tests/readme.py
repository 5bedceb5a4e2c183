"""README.md as a reader plays it: the commands of a section, one after the other in one shell."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SECONDS = 1800.0

CAMPAIGNS = {
    "make test": ".ci/run",
    "make chaos-services": "tests/integration/test_chaos_services.py",
    "make chaos-ranks": "tests/integration/test_ranks_chaos.py",
    "make chaos-cluster": "tests/e2e/conftest.py",
    "make bench-growth": "tests/unit/test_benchmark_growth.py",
    "make bench-execution": "tests/unit/test_benchmark_execution.py",
    "make bench-distributed": "tests/unit/test_benchmark_distributed.py",
}
"""Commands that last too long for a test, or hold the tests, each with what runs it instead: the
script that must pass before a change lands, or a test of the same module in a quick form, or what a
test has under way."""
MAKE = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGUMENTS"}
"""What a make that runs these tests gives to one below it: a reader's is below none."""
STAY = {"make services": "Ctrl-C stops", "make cluster-api": "Ctrl-C stops"}
"""Commands that stay until Ctrl-C, with what they say once they are ready."""

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^##+ (.+)\n", re.MULTILINE)


def sections(text=None):
    """The text below each heading, without that below the next one of any level."""
    text = README.read_text() if text is None else text
    headings = list(_HEADING.finditer(text))
    ends = [found.start() for found in headings[1:]] + [len(text)]
    return {found[1]: text[found.end() : end] for found, end in zip(headings, ends, strict=True)}


def blocks(section, language):
    """The blocks of a language in a section."""
    found = _BLOCK.findall(sections()[section])
    return [block for named, block in found if named == language]


def commands(section):
    """The commands of a section in its blocks of sh, without comments."""
    text = "".join(blocks(section, "sh")).replace("\\\n", " ")
    lines = (re.sub(r"(^|\s+)#.*$", "", line).strip() for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line]


def checkout(folder):
    """A copy of the repository as a reader has it, with the environment of these tests.

    Its files are as old as can be, so that make finds that environment made, and leaves it alone.
    """
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
            os.utime(folder / name, (0, 0))
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def readers(environment):
    """The variables of these tests as a reader has them, and further ones."""
    return {n: value for n, value in os.environ.items() if n not in MAKE} | environment


def play(section, folder, **environment):
    """Run the commands of a section in `folder`; returns what each printed.

    All but campaigns are run, and all must succeed. What stays until Ctrl-C is in the background
    for those after it, and gets one at the end.

    Args:
        section: its heading.
        folder: as `checkout` makes it.
        environment: further variables.
    """
    script, log = ["set -eu -o pipefail -m"], folder / "played"
    for earlier in folder.glob("played-*"):
        earlier.unlink()
    staying = [command for command in commands(section) if command in STAY]
    for number, command in enumerate(commands(section)):
        output = shlex.quote(f"{log}-{number}")
        if command in STAY:
            ready = shlex.quote(STAY[command])
            script += [f"{command} >{output} 2>&1 & stays=$!", "trap 'kill -INT -$stays' EXIT"]
            script += [f"until grep -q {ready} {output}; do kill -0 $stays; sleep 0.2; done"]
        elif command not in CAMPAIGNS:
            # In this shell, not in one of its own: what it exports is for those after it.
            script.append(f"{{ {command}\n}} >{output}")
    if staying:
        script += ["trap - EXIT; kill -INT -$stays", "wait $stays || true"]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        env=readers(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    numbered = enumerate(commands(section))
    paths = {command: Path(f"{log}-{number}") for number, command in numbered}
    said = {command: path.read_text() for command, path in paths.items() if path.exists()}
    assert done.returncode == 0, (done.returncode, said, done.stderr[-4000:])
    assert said.keys() == set(commands(section)) - CAMPAIGNS.keys()
    for command in staying:
        assert said[command].rstrip().endswith("stopped"), said[command]
    return said
