"""Tests mirror the tree; helpers they share are imported as tests.NAME."""
