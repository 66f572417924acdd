"""Random views of images."""

from .eager import views_reference
from .op import INTERPOLATIONS, make_views

__all__ = ["INTERPOLATIONS", "make_views", "views_reference"]
