"""`sanrt serve`: pictures over HTTP, for programs and for people. Needs the `serve` extra."""
