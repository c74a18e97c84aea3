"""The comparison that the pages and pictures are made of."""

from comparisons import found as found
