"""Images: downloaded, checked, deployed, captured."""
