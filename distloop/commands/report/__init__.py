"""`distloop report`: a run, or several beside each other, as one HTML file that needs no network and no server."""
