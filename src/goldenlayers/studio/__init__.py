"""A page to look at a fact, edit it, and see what moved: ``golden studio``.

The work is done by :class:`Workbench` and :class:`Session`, which know of no page. The page itself
(Gradio, the extra ``studio``) is a thin layer on top; :func:`serve` hands it to this machine alone.
"""

from goldenlayers.studio.serving import bound, serve
from goldenlayers.studio.workbench import Edit, Session, Workbench, make_fact

__all__ = ["Edit", "Session", "Workbench", "bound", "make_fact", "serve"]
