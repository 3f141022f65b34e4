"""Reads the pages of reports, and a text that no page may take for markup."""

from html.parser import HTMLParser

NASTY = "</script><script>alert(1)</script><img src=http://example.com/x onerror=alert(1)>"


class Page(HTMLParser):
    """The elements of a page, and the text of each section outside of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.sections: dict[str, str] = {}
        self.scripts: list[str] = []
        self._section = self._inside = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "section":
            self._section = dict(attributes)["id"]
            self.sections[self._section] = ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None
        self._section = None if tag == "section" else self._section

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._section:
            self.sections[self._section] += data
