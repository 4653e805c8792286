"""``vsock web``: contexts and streams as a page for the browser, and what one can do to them."""

from .command import web as web
