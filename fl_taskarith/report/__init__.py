"""The results of studies as a two-column paper: read, compared, put into words by rules, typeset. Never trains."""
