"""Results for people: tables, plots, contact sheets, one page; and documented numbers checked."""
