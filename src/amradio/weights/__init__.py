"""How weights get in and out: the catalog of published models, downloads, and one module for each file layout."""
