"""The page of a study: one file without links, in the order in which a reader asks."""
