"""What a test asks of a page of HTML or of a picture in SVG."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Whether every tag is closed, what a page loads, the titles and the words in it."""

    def __init__(self, page):
        super().__init__()
        self.open, self.loads, self.titles, self.words = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("title", "text"):
            (self.titles if self.open[-1] == "title" else self.words).append(data)
