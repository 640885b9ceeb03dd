"""Fetching files over HTTP and unpacking them; and where the published data sets lie."""
