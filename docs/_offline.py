"""Keeps the pages from asking GitHub for stars and releases whenever one is opened."""


def on_post_page(output, **kwargs):
    return output.replace(' data-md-component="source"', "")
