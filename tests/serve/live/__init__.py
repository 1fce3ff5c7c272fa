"""Tests against the running application over HTTP; a package, so that the application stops with its last test."""
