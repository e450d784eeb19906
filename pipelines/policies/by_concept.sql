-- resolution: 256
--
-- Balanced by concept: images of frequent concepts are thinned by chance, those of rare ones stay. Needs the annotation `concepts`:
-- `weight` says how often an image would be drawn if all concepts had the same share (1 on average), `draw` is the image's own number
-- between 0 and 1, always the same. The factor 0.5 takes about half of the images; a smaller one takes fewer and evens out more.
SELECT
  basics.uid,
  basics.error IS NULL AS decoded, -- 2: nothing can be said about a broken file
  duplicates.representative AS not_duplicate, -- 1: of files that show the same picture, also mirrored, one stays
  concepts.draw < 0.5 * concepts.weight AS not_over_represented -- 1: no concept drowns the others
FROM basics
LEFT JOIN duplicates USING (uid)
LEFT JOIN concepts USING (uid)
