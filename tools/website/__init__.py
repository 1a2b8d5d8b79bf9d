"""What turns ``docs/`` into the documentation site (``make docs``); MkDocs calls :mod:`tools.website.hooks`."""
