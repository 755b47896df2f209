"""The HTML report in a headless Chromium, at desktop and phone width, light and dark.

    python benchmarks/page.py out/report.html --pictures /tmp/pictures

Exits 1 if the page says anything on the console, is wider than the window, loads something, or shows a figure
that is not that of the JSON inside it. Needs Debian's package `chromium`.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from tempfile import TemporaryDirectory

from llmc.report import Report
from llmc.report.figures import format_estimate

WINDOWS = {"desktop": (1280, 2000), "phone": (500, 2400)}  # Chromium makes no window narrower than 500
PHONE = 390
#: Put into a copy of the page: what only the browser knows, and a frame of a phone's width.
PROBE = """<script>addEventListener("load", () => document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth, window: innerWidth,
  loaded: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
  pictures: [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height > 50).length,
}))</script>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
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
                found = json.loads(unescape(title.group(1))) if title else {}
                print(f"{name} {scheme}: {found}, console: {console or 'nothing'}")
                wrong += [f"{name}: {line}" for line in console]
                if not found or found["wide"] > found["window"] or found["loaded"] or not found["pictures"]:
                    wrong.append(f"{name}: {found}")
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


def figures(text: str) -> list[str]:
    """Figures of the page that are not those of its JSON."""
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
    """The page in a frame of a phone's width, which tells its title to the outer page."""
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
    """The page's DOM once it has loaded, and what it said on the console; a picture of it into `out`."""
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
