"""Puts the thin spaces around log and exp that TeX would put there, and MathML made from it lacks."""

import re

NAME = r"<mi>(?:log|exp)</mi>"
THIN = '<mspace width="0.17em"/>'
CLOSING = r"(?:&#x00029;</mo>|</mi>|</mn>|</msub>)"


def on_page_content(html, **kwargs):
    html = re.sub(rf"({CLOSING})(?={NAME})", rf"\1{THIN}", html)
    return re.sub(rf"({NAME})(?!<mo)", rf"\1{THIN}", html)
