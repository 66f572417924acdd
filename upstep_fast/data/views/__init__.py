"""Random views of images: pure functions of (seed, epoch, index, view)."""

from upstep_fast.data.views.types import Views
from upstep_fast.data.views.view_config import ViewConfig
from upstep_fast.data.views.views import multi_crop, random_views

__all__ = ["ViewConfig", "Views", "multi_crop", "random_views"]
