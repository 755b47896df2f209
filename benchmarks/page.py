"""Open the HTML report in a headless Chromium, at desktop and phone width, light and dark.

    python benchmarks/page.py out/report.html --pictures /tmp/pictures

The exit code is 1 if the page writes to the console, is wider than the window, loads something, or shows a
figure that differs from the JSON inside it. Requires Debian's package `chromium`.
"""

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from tempfile import TemporaryDirectory

from common.options import make_parser

from llmc.report import Report
from llmc.report.figures import format_estimate

WINDOWS = {"desktop": (1280, 2000), "phone": (500, 2400)}  # Chromium's narrowest window is 500 wide
PHONE = 390
#: A script for a copy of the page, which reports what only the browser knows, and the width of a phone.
PROBE = """<script>addEventListener("load", () => document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth, window: innerWidth,
  loaded: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
  pictures: [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height > 50).length,
}))</script>"""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--browser", default="chromium")
    options = parser.parse_args()
    browser = shutil.which(options.browser)
    if browser is None:
        sys.exit(f"there is no {options.browser} on this machine: apt install chromium")
    text = options.page.read_text(encoding="utf-8")
    wrong = figures(text)
    with TemporaryDirectory() as place:
        probed = Path(place) / "page.html"
        probed.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
        narrow = Path(place) / "phone.html"
        narrow.write_text(phone(text), encoding="utf-8")
        for name, (width, height) in WINDOWS.items():
            for scheme in ("light", "dark"):
                page = narrow if name == "phone" else probed
                dom, console = look(browser, page, width, height, scheme, place, options.pictures, name)
                title = re.search(r"<title>(.*?)</title>", dom)
                properties = json.loads(unescape(title.group(1))) if title else {}
                print(f"{name} {scheme}: {properties}, console: {console or 'nothing'}")
                wrong += [f"{name}: {line}" for line in console]
                if (
                    not properties
                    or properties["wide"] > properties["window"]
                    or properties["loaded"]
                    or not properties["pictures"]
                ):
                    wrong.append(f"{name}: {properties}")
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


def figures(text: str) -> list[str]:
    """Return the figures of the page that differ from those of its JSON."""
    document = re.search(r'<script type="application/json" id="report">(.*?)</script>', text, re.DOTALL)
    if document is None:
        return ["the page has no JSON"]
    report = Report.model_validate_json(document.group(1).replace("<\\/", "</"))
    shown = dict(re.findall(r'data-metric="([^"]+)">([^<]*)<', text))
    stated = {m.metric.value: format_estimate(m.value, m.low, m.high) for m in report.measurements}
    print(f"{len(shown)} figures on the page, {len(stated)} in its JSON")
    return [
        f"{n}: page {shown.get(n)}, JSON {v}" for n, v in stated.items() if unescape(shown.get(n, "")) != v
    ]


def phone(text: str) -> str:
    """Return the page in a frame of a phone's width, which passes its title to the outer page."""
    inner = text.replace("</body>", PROBE + "</body>").replace("&", "&amp;").replace('"', "&quot;")
    return (
        '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<body style="margin:0"><iframe width="{PHONE}" height="2300" style="border:0" '
        f'srcdoc="{inner}"></iframe>'
        "<script>const frame = document.querySelector('iframe'); frame.addEventListener('load', () =>"
        " setTimeout(() => document.title = frame.contentDocument.title, 100))</script>"
    )


def look(
    browser: str, page: Path, width: int, height: int, scheme: str, place: str, out: Path | None, name: str
) -> tuple[str, list[str]]:
    """Return the loaded page's DOM, and its console output; save a picture of it in `out`."""
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={place}/profile",
        f"--window-size={width},{height}", "--virtual-time-budget=3000", "--enable-logging=stderr", "--v=0",
        "--hide-scrollbars", *(["--force-dark-mode"] if scheme == "dark" else []),
    ]  # fmt: skip
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        picture = f"--screenshot={out.resolve()}/{name}-{scheme}.png"
        subprocess.run([*command, picture, page.as_uri()], capture_output=True, check=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


if __name__ == "__main__":
    main()
