"""Write the README's tables and its picture from the files in results/, or say that they are not made from these.

python scripts/bench/readme.py           # after a benchmark
python scripts/bench/readme.py --check   # exit code 1 where something is stale; writes nothing
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT
from readme_picture import panels, picture
from readme_tables import pruning_table, quality_table, speed_table

README, PICTURE = ROOT / "README.md", ROOT / ".github" / "result.svg"
SUBJECT, LARGE = "smollm2-135m", "llama-1b-random"
TITLE = "SmolLM2-135M, dense and compressed by hf_shrink and others"


def read(name: str) -> dict[str, Any]:
    """A results file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def filled(text: str, tables: dict[str, str]) -> str:
    """`text` with every table between its two comments. Raises ValueError where these are missing."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: made by scripts/bench/readme.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", flags=re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{README.name} needs one pair of the comments {begin} and {end}")
        text = pattern.sub(lambda _, new=f"{begin}\n{table}\n{end}": new, text)
    return text


def made() -> dict[Path, str]:
    """What the files should hold, from the results as they are."""
    quality, older, speed = read("quality"), read("quality-part1"), read("speed")
    tables = {
        "quality": quality_table(quality, older),
        "speed": speed_table(speed, SUBJECT),
        "speed of 1B": speed_table(speed, LARGE),
        "pruning": pruning_table(read("pruning")),
    }
    return {
        README: filled(README.read_text(encoding="utf-8"), tables),
        PICTURE: picture(panels(quality, older, speed, SUBJECT), TITLE),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file is stale")
    options = parser.parse_args()
    stale = {path: text for path, text in made().items() if not path.is_file() or path.read_text("utf-8") != text}
    for path, text in stale.items():
        if options.check:
            print(
                f"{path.relative_to(ROOT)} is not made from the results: run scripts/bench/readme.py", file=sys.stderr
            )
        else:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
