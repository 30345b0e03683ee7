"""The Flower ClientApp: one virtual client per partition; `fl_taskarith.client.app` works."""

from fl_taskarith.client.app import app

__all__ = ["app"]
