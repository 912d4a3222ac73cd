"""The clients' side: HTTP/1.1 from the listening socket to one request and its answer."""
