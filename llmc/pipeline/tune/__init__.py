"""`llmc tune`: candidates, the order in which they are tried, and what is measured of them."""
