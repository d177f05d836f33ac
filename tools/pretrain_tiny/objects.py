"""The nouns of the toy world: which emoji are in it, under which name, and which are held back as concepts.

One entry is `label` or `label=name`, where `label` is the English label of emojibase-data and `name` the words used in
captions. Look-alikes, faces, flags, symbols and clock times are left out on purpose: a small model learns few objects well.
"""

from __future__ import annotations

_TRAIN = """
monkey; gorilla; dog; wolf; fox; raccoon; cat; black cat; lion; tiger; horse; moose; donkey; zebra; deer;
cow; pig; goat; camel; llama; giraffe; elephant; rhinoceros=rhino; mouse; hamster; rabbit; beaver;
hedgehog; bat; bear; polar bear; panda; sloth; otter; kangaroo; turkey; chicken; rooster; hatching chick;
baby chick=chick; bird; penguin; eagle; duck; swan; flamingo; parrot; frog; crocodile; turtle; lizard;
snake; dragon; T-Rex=dinosaur; spouting whale=whale; dolphin; seal; fish; tropical fish;
blowfish=puffer fish; shark; octopus; spiral shell=shell; coral; jellyfish; crab; shrimp; squid; snail;
butterfly; bug=caterpillar; ant; honeybee=bee; beetle; lady beetle=ladybug; scorpion; bouquet;
white flower; rose; hibiscus; sunflower; tulip; potted plant; evergreen tree=pine tree;
deciduous tree=tree; palm tree; four leaf clover=clover; maple leaf; nest with eggs=nest; mushroom;
grapes=bunch of grapes; melon; watermelon; tangerine=orange; lemon; banana; pineapple; mango; red apple;
green apple; pear; peach; cherries=pair of cherries; strawberry; kiwi fruit=kiwi; tomato; coconut;
avocado; eggplant; potato; carrot; ear of corn=corn cob; bell pepper; cucumber; broccoli; onion;
bread=loaf of bread; croissant; baguette bread=baguette; pretzel; bagel; pancakes=stack of pancakes;
waffle; cheese wedge=piece of cheese; meat on bone; bacon=strip of bacon; hamburger;
french fries=box of french fries; pizza=slice of pizza; hot dog; sandwich; taco; burrito; egg;
popcorn=box of popcorn; sushi; doughnut; cookie; birthday cake; cupcake; pie; chocolate bar; candy;
lollipop; honey pot; baby bottle; glass of milk; hot beverage=cup of coffee; wine glass; cocktail glass;
beer mug; ice cream; soft ice cream=ice cream cone; bubble tea; spoon; kitchen knife=knife; amphora=vase;
compass; volcano; brick; rock; wood=log; house; office building; castle; church; fountain; tent;
carousel horse; ferris wheel; locomotive=steam train; train; bus; ambulance; fire engine=fire truck;
police car; taxi; automobile=car; pickup truck; tractor; motor scooter=scooter; bicycle; skateboard;
roller skate; wheel; vertical traffic light=traffic light; stop sign; anchor; ring buoy=life ring;
sailboat; canoe; speedboat; ship; parachute; helicopter; rocket; luggage=suitcase;
hourglass done=hourglass; watch; alarm clock; crescent moon; full moon; sun with face=sun;
ringed planet=planet; star; rainbow; closed umbrella; umbrella=umbrella; snowman without snow=snowman;
fire=flame; droplet=water drop; Christmas tree; balloon; wrapped gift=gift box; trophy;
sports medal=medal; soccer ball; baseball; basketball; volleyball; american football;
tennis=tennis racket; bowling; boxing glove; bullseye=target; yo-yo; kite; water pistol;
pool 8 ball=eight ball; crystal ball; magic wand; video game=game controller; game die=die; puzzle piece;
mirror ball=disco ball; artist palette=palette; yarn=ball of yarn; glasses=pair of glasses;
goggles=pair of goggles; necktie; t-shirt; jeans=pair of jeans; scarf; gloves=pair of gloves; coat;
socks=pair of socks; dress; shorts=pair of shorts; purse; backpack; running shoe; high-heeled shoe; crown;
woman’s hat=sun hat; top hat; graduation cap; military helmet=helmet; ring; gem stone=diamond;
loudspeaker; megaphone; bell; musical note; microphone; headphone=pair of headphones; radio; saxophone;
trumpet; accordion; guitar; musical keyboard=piano keyboard; drum; mobile phone=phone; battery; laptop;
floppy disk; movie camera; television; camera; light bulb; flashlight; red paper lantern=red lantern;
closed book=red book; books=stack of books; coin; money bag; package=cardboard box; postbox=mailbox;
pencil; briefcase; pushpin; straight ruler=ruler; locked=padlock; key; hammer; axe; bomb; boomerang;
bow and arrow; wrench; screwdriver; toolbox; magnet; ladder; microscope; telescope; door; mirror; chair;
toilet; bathtub; broom; basket; bucket; fire extinguisher; moai=stone head
"""

_HELD_BACK = """
robot; alien; ghost; teddy bear; jack-o-lantern=pumpkin; unicorn; koala; owl; cactus; lobster; flying saucer; teapot; violin;
mammoth; peacock; nesting dolls=nesting doll; piñata; sauropod=long-necked dinosaur; hippopotamus=hippo; cow face=cow head; rabbit face=rabbit head
"""


def _parse(text: str) -> dict[str, str]:
    entries = (part.strip() for part in text.replace("\n", " ").split(";"))
    pairs = (entry.split("=") for entry in entries if entry)
    return {pair[0].strip(): pair[-1].strip() for pair in pairs}


TRAIN: dict[str, str] = _parse(_TRAIN)
HELD_BACK: dict[str, str] = _parse(_HELD_BACK)
