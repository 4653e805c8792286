"""``vsock web``: a page that shows contexts and streams, and can suspend and disconnect them."""
