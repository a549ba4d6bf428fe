"""Walk the built site in Chromium: ``python docs/walk.py [SITE] [--shots FOLDER]`` (``make walk``).

Every page is opened 390 and 1280 pixels wide. Said are pages that are wider than the window,
pictures that do not load, formulas and tables that were not rendered, and whatever is asked of
another machine. The exit code is 1 where there is any. ``--shots`` takes the narrow ones dark.
"""

from __future__ import annotations

import argparse
import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

_WIDTHS = (390, 1280)
_PAGE = """<!doctype html><meta charset=utf-8><body><script>
const look = (frame, url, width) => {
  const d = frame.contentDocument, faults = [];
  const root = d.scrollingElement;
  if (root.scrollWidth > width) {
    const box = [...d.body.querySelectorAll(".md-content *")].filter(
      e => e.getBoundingClientRect().right > width + 1 && !e.closest(
        "pre, .md-typeset__scrollwrap, math")).pop();
    faults.push("wider than the window: " + root.scrollWidth + " " +
      (box ? box.tagName + " " + box.textContent.trim().slice(0, 60) : ""));
  }
  for (const i of d.images) if (!i.complete || !i.naturalWidth) faults.push("no picture " + i.src);
  for (const p of d.querySelectorAll(".md-content p"))
    if (/^\\s*\\|.*\\|/.test(p.textContent))
      faults.push("broken table " + p.textContent.slice(0, 60));
  if (d.querySelector("merror, .arithmatex")) faults.push("a formula was not rendered");
  for (const m of d.querySelectorAll("math[display=block]"))
    if (m.getBoundingClientRect().height < 8) faults.push("an empty formula");
  for (const r of frame.contentWindow.performance.getEntriesByType("resource"))
    if (!r.name.startsWith(location.origin)) faults.push("asks another machine: " + r.name);
  return faults.map(fault => [url, width, fault]);
};
const open = (url, width) => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.style = "border:0;height:900px;width:" + width + "px";
  frame.onload = () => setTimeout(() => { done(look(frame, url, width)); frame.remove(); }, 150);
  frame.src = url;
  document.body.append(frame);
});
(async () => {
  const found = [];
  for (const url of URLS) for (const width of WIDTHS) found.push(...await open(url, width));
  const pre = document.createElement("pre");
  pre.id = "found";
  pre.textContent = JSON.stringify(found);
  document.body.append(pre);
})();
</script>"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _chromium(*options: str) -> str:
    program = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    command = [program, *fixed, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout


def main() -> int:
    """Walk; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("site", nargs="?", default="site", type=Path)
    parser.add_argument("--shots", type=Path, help="folder for a screenshot of every page")
    args = parser.parse_args()
    if not (args.site / "index.html").is_file():
        parser.error(f"{args.site} holds no site: run make docs")
    urls = sorted(
        "/" + x.relative_to(args.site).as_posix().removesuffix("index.html")
        for x in args.site.rglob("*.html")
    )
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "site"
        shutil.copytree(args.site, copy)
        page = f"<script>const URLS={json.dumps(urls)},WIDTHS={json.dumps(_WIDTHS)}</script>{_PAGE}"
        (copy / "walk.html").write_text(page)
        handler = functools.partial(_Quiet, directory=str(copy))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        origin = f"http://127.0.0.1:{server.server_port}"
        dom = _chromium("--dump-dom", "--virtual-time-budget=600000", f"{origin}/walk.html")
        found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)[1]))
        for url in urls if args.shots else ():
            args.shots.mkdir(parents=True, exist_ok=True)
            for width in _WIDTHS:
                name = url.strip("/").replace("/", "-").removesuffix(".html") or "home"
                style = f"border:0;width:{width}px;height:3000px"
                (copy / "shot.html").write_text(
                    f'<body style="margin:0"><iframe src="{url}" style="{style}"></iframe>'
                )
                _chromium(
                    f"--screenshot={args.shots.resolve()}/{name}-{width}.png",
                    f"--window-size={width},3000",
                    *(["--blink-settings=preferredColorScheme=0"] if width < 500 else []),
                    f"{origin}/shot.html",
                )
    for url, width, fault in found:
        print(f"{url} at {width}: {fault}")
    print(f"{len(urls)} pages at {' and '.join(map(str, _WIDTHS))} pixels: {len(found)} faults")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
