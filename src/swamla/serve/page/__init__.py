"""The page: one document of markup, style and scripts, which loads nothing from elsewhere."""

from importlib.resources import files


def page() -> bytes:
    """The document."""
    here = files("swamla.serve.page")
    markup, style, writing, attention = (
        (here / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js", "attention.js")
    )
    return markup.replace("STYLE", style, 1).replace("SCRIPT", writing + attention, 1).encode()
