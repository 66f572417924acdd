"""Random views of images: pure functions of (seed, epoch, index, view)."""

from upstep_fast.data.views.make_views import multi_crop, random_views
from upstep_fast.data.views.types import Views
from upstep_fast.data.views.view_config import ViewConfig

__all__ = ["ViewConfig", "Views", "multi_crop", "random_views"]
