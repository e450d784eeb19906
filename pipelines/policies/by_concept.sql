-- resolution: 256
--
-- Balanced by concept: images of frequent concepts are thinned by chance, those of rare ones stay. Needs the annotation `concepts`:
-- `weight` is the chance that an image of its concept is kept, `draw` its own random number between 0 and 1, always the same.
SELECT
  basics.uid,
  basics.error IS NULL AS decoded, -- 2: nothing can be said about a broken file
  duplicates.representative AS not_duplicate, -- 1: of files that show the same picture, also mirrored, one stays
  concepts.draw < concepts.weight AS not_over_represented -- 1: no concept drowns the others
FROM basics
LEFT JOIN duplicates USING (uid)
LEFT JOIN concepts USING (uid)
