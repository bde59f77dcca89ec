"""The page of all results: claims, verdicts and figures."""
