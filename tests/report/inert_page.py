"""A report as a browser sees it: its elements and words, and a check that nothing in it runs or loads."""

import html.parser
import re

VOID = {"meta", "link", "img", "br", "hr", "input"}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</svg></style><script src=http://evil.test/x.js></script>",
    "$\\frac{1}{",
    "{{ 7 * 7 }}{% raw %}",
    "a\x00\x1b\ufffe\ud800 'b' &amp; 猫",
)


class Page(html.parser.HTMLParser):
    """Elements, text outside style sheets, and a check that tags are balanced."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text, self.style, self.open = [], [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.style if "style" in self.open else self.text).append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def assert_inert(source, links=()):
    """No element or attribute that runs or loads anything. `links`: where its links may lead."""
    page = Page(source)
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "img", "video", "audio"} & set(page.tags)
    for key, value in page.attributes:
        assert not key.startswith("on")
        if key in ("src", "href", "xlink:href", "srcset", "data", "poster", "action", "background"):
            inside = value.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,"))
            assert inside or (key == "href" and value in links), (key, value[:80])
        if key == "style":
            page.style.append(value)
    style = " ".join(page.style)
    assert "@import" not in style
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", style))
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes
    return page
