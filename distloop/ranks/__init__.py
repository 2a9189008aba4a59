"""The processes that train together: who they are, how they meet, fail and stop."""
