"""A picture of a page, as a browser shows it; the README's pictures are made with it.

    python tests/screenshot.py front.html --to dashboards/pictures/pareto-page.png --width 1280 --height 1600

The address is a file or a URL; what follows ``#`` in it is kept, so that ``front.html#legal/12`` shows that domain with
trial 12. Needs Chromium. Where the page had problems, they are printed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from browser import CHROMIUM, chromium

# Those that the browser fetches later, when they are scrolled to, are not waited for; drawings may have no size.
_IMAGES = "[...document.images].filter(image => image.loading !== 'lazy' && !/[.]svg$|^data:/.test(image.src))"
# MLflow's pages ask who has logged in, and get 404 where nobody has to; its tables name what is deprecated in them.
_USUAL = ("/ajax-api/2.0/mlflow/users/current", "AG Grid: since v27.1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="a file, or a URL")
    parser.add_argument("--to", type=Path, required=True, help="the PNG file")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, help="cut there; the whole page where absent")
    parser.add_argument("--scale", type=float, default=1, help="pixels of the picture per pixel of the page")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--phone", action="store_true")
    parser.add_argument("--wait", metavar="TEXT", help="until the page shows this text")
    parser.add_argument("--click", metavar="SELECTOR", action="append", default=[], help="once it is there; in order")
    parser.add_argument("--settle", metavar="SECONDS", type=float, default=0, help="wait so long before the picture")
    options = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("no Chromium on this machine")
    file, _, hash_part = options.address.partition("#")
    address = file if "://" in file else Path(file).resolve().as_uri()
    with chromium() as page:
        page.size(options.width, options.height or 900, phone=options.phone, scale=options.scale)
        page.theme("dark" if options.dark else "light")
        page.call("Emulation.setScrollbarsHidden", hidden=True)
        page.open(address + (f"#{hash_part}" if hash_part else ""))
        if options.wait is not None:
            page.wait(f"document.body !== null && document.body.innerText.includes({json.dumps(options.wait)})")
        for selector in options.click:
            page.wait(f"document.querySelector({json.dumps(selector)}) !== null")
            page.click(selector)
        time.sleep(options.settle)
        page.wait(f"{_IMAGES}.every(image => image.complete)")
        broken = page.evaluate(f"{_IMAGES}.filter(image => image.naturalWidth === 0).map(image => image.src)")
        picture = page.picture(whole=options.height is None)
        found = [problem for problem in page.problems if not any(text in problem for text in _USUAL)]
        problems = [*found, *(f"no picture: {source}" for source in broken)]
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_bytes(picture)
    if problems:
        # What the page should show may be missing in the picture.
        raise SystemExit("\n".join([f"{options.to} was written, but the page had problems:", *problems]))


if __name__ == "__main__":
    main()
