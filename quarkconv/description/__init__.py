"""Headers, scheme and experts as one Description, with every contradiction as a finding."""
