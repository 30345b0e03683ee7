"""The Flower ClientApp: one virtual client per partition; `fl_taskarith.client` works."""

from fl_taskarith.client import app

__all__ = ["app"]
